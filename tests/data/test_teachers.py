"""Each row has the teacher of its tag; a row without one is named by file and line."""

from __future__ import annotations

from typing import Any

import pytest

from megabatch.config.served_teachers import Served, served_teachers, teacher_tags
from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.teachers import teacher_of
from megabatch.errors import DataError

TWO = '[{"url": "http://h:1", "tags": ["math", "physics"]}, {"url": "role:code", "tags": ["code.jsonl"]}]'
TAGS = (("math", 0), ("physics", 0), ("code.jsonl", 1))


def row(file: str = "/data/code.jsonl", **fields: Any) -> Row:
    return Row(Origin(file, 7), fields)


def test_servers_and_their_tags() -> None:
    assert served_teachers("http://h:1 ") == [Served("http://h:1")] and teacher_tags("http://h:1") == ()
    assert served_teachers(TWO) == [Served("http://h:1", ("math", "physics")), Served("role:code", ("code.jsonl",))]
    assert teacher_tags(TWO) == TAGS and teacher_tags(None) == ()
    for wrong, rule in (
        ("[]", "names no teacher"),
        ("[{", "is not JSON"),
        ('[{"url": 1, "tags": ["a"]}]', "the form"),
    ):
        with pytest.raises(ValueError, match=rule):
            served_teachers(wrong)


def test_a_row_has_the_teacher_of_its_tag() -> None:
    assert teacher_of(row(dataset="physics"), TAGS, key="dataset") == 0
    assert teacher_of(row(), TAGS, key="dataset") == 1, "its file's name"
    assert teacher_of(row(kind=3), (("3", 1),), key="kind") == 1


def test_a_row_without_a_teacher_is_named() -> None:
    with pytest.raises(DataError, match=r"^/data/a.jsonl:7: has dataset='a.jsonl', and so no teacher: .*'math', 'phy"):
        teacher_of(row("/data/a.jsonl"), TAGS, key="dataset")
    with pytest.raises(DataError, match=r"has dataset='art', and so no teacher"):
        teacher_of(row(dataset="art"), TAGS, key="dataset")
    with pytest.raises(DataError, match=r":7: has no column 'kind', and so no teacher"):
        teacher_of(row(dataset="math"), TAGS, key="kind")
