"""Each row has the teacher of its tag; a row without one is named by file and line."""

from __future__ import annotations

from typing import Any

import pytest

from megabatch.config.several_teachers import Named, each_model, models_named, teacher_tags, teachers_named
from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.teachers import teacher_of
from megabatch.errors import DataError

TWO = '[{"url": "http://h:1", "tags": ["math", "physics"]}, {"url": "role:code", "tags": ["code.jsonl"]}]'
MODELS = '[{"model": "a b", "tags": ["math", "physics"]}, {"model": "c", "tags": ["code.jsonl"]}]'
TAGS = (("math", 0), ("physics", 0), ("code.jsonl", 1))


def row(file: str = "/data/code.jsonl", **fields: Any) -> Row:
    return Row(Origin(file, 7), fields)


def test_servers_and_their_tags() -> None:
    assert teachers_named("http://h:1 ", "url") == [Named("http://h:1")]
    assert teachers_named(TWO, "url") == [
        Named("http://h:1", ("math", "physics")),
        Named("role:code", ("code.jsonl",)),
    ]
    assert teacher_tags(server=TWO, model=None) == TAGS
    assert teacher_tags(server="http://h:1", model=None) == teacher_tags(server=None, model=None) == ()
    for wrong, rule in (
        ("[]", "names no teacher"),
        ("[{", "is not JSON"),
        ('[{"url": 1, "tags": ["a"]}]', "the form"),
        ('[{"model": "m", "tags": ["a"]}]', 'the form {"url"'),
    ):
        with pytest.raises(ValueError, match=rule):
            teachers_named(wrong, "url")


def test_models_and_their_tags() -> None:
    assert teacher_tags(server=None, model=MODELS) == TAGS
    assert models_named(MODELS) == ["a b", "c"] and models_named("a,b") == ["a,b"] and models_named(None) == []
    assert each_model("a", "/{}".format) == "/a"
    assert models_named(each_model(MODELS, "/{}".format)) == ["/a b", "/c"]
    assert teacher_tags(server=None, model=each_model(MODELS, "/{}".format)) == TAGS
    assert each_model("[{", "/{}".format) == "[{" and models_named("[{") == [], "which a rule refuses"


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
