"""Declared types: fitting, reading, naming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.config.declare import parameters
from megabatch.config.field_types import fits, read, spelled
from megabatch.config.recipe import Recipe

READ = [
    (["4"], int, 4),
    (["1e-5"], float, 1e-5),
    (["3"], float, 3.0),
    (["None"], int | None, None),
    (["null"], str | None, None),
    (["none"], Literal["full", "none"] | None, "none"),
    (["2"], Literal[0, 1, 2], 2),
    (["TRUE"], bool, True),
    (["off"], bool, False),
    (["1"], bool | None, True),
    (["a", "b"], Sequence[str], ("a", "b")),
    (['["a", "b c"]'], Sequence[str], ("a", "b c")),
    (["2"], int | Sequence[int] | None, 2),
    (["1", "0"], int | Sequence[int] | None, (1, 0)),
    (["[1, 0, 1]"], int | Sequence[int] | None, (1, 0, 1)),
    (["0.5", "1"], Sequence[float] | None, (0.5, 1.0)),
    (['{"rope_type": "yarn"}'], Mapping[str, Any] | None, {"rope_type": "yarn"}),
    (["128,0"], str | None, "128,0"),
]
UNREADABLE = [
    (["four"], int, "must be a whole number"),
    (["1.5"], int | None, "must be a whole number or None"),
    (["maybe"], bool, "must be true or false"),
    (["ful"], Literal["full", "none"], "must be one of 'full', 'none'"),
    (["[1]"], Mapping[str, Any], "must be a mapping (JSON object)"),
    (["1", "x"], Sequence[int], "must be a list of whole numbers"),
    (["[1, 2"], Sequence[int], "must be a list of whole numbers"),
]


@pytest.mark.parametrize(("texts", "hint", "value"), READ)
def test_read(texts, hint, value):
    found = read(texts, hint)
    assert found == value and type(found) is type(value)
    assert fits(found, hint)


@pytest.mark.parametrize(("texts", "hint", "message"), UNREADABLE)
def test_unreadable(texts, hint, message):
    with pytest.raises(ValueError, match="must be") as error:
        read(texts, hint)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "hint"),
    [(True, int), (1, bool), (1.0, int), ("1", int), (None, int), (float("inf"), float), (["a"], Sequence[str])],
)
def test_misfits(value, hint):
    assert not fits(value, hint)


@given(st.integers() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False))
def test_scalars_fit_and_read_back(value):
    assert fits(value, type(value))
    assert read([str(value)], type(value)) == value


@given(st.lists(st.integers(), min_size=1, max_size=5))
def test_lists_read_back(numbers):
    assert read([str(number) for number in numbers], Sequence[int]) == tuple(numbers)


def test_every_default_reads_back_from_its_text():
    for parameter in parameters(Recipe):
        default = parameter.default
        texts = [str(item) for item in default] if isinstance(default, tuple) else [str(default)]
        if texts:
            assert read(texts, parameter.hint) == default, parameter.dotted


def test_every_type_has_words():
    for parameter in parameters(Recipe):
        assert "typing" not in spelled(parameter.hint) and "<" not in spelled(parameter.hint)
