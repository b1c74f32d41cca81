"""Layout strings, with the place of every mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.errors import ConfigError
from megabatch.plan.pipeline_layout import parse

READ = [
    ("E|(t|)*3,m|m||L", ("E", "t", "t", "t", "m", "m", "", "L")),
    ("Et*3|t*2,|tL", ("Ettt", "tt", "tL")),
    ("Ettt|(tt|)*3,m|L", ("Ettt", "tt", "tt", "tt", "m", "L")),
    ("E(t|t)*2L", ("Et", "tt", "tL")),
    ("E|*3tL", ("E", "", "", "tL")),
    ("E , t * 2 | t L", ("Ett", "tL")),
    ("(Et)*1,L", ("EtL",)),
    ("", ("",)),
]
BROKEN = [
    ("Ett|tx|L", 6, "'x' is none of E, t, m, L"),
    ("Et*L", 4, "count of 1 or more"),
    ("Et*0L", 4, "count of 1 or more"),
    ("E(t|)L", 6, "a group needs a count, as in (t|)*2"),
    ("E(t|L", 2, "never closed"),
    ("E((t)*2|)*2L", 3, "group inside a group"),
    ("Et)L", 3, "')' is none"),
    ("*2", 1, "'*' is none"),
    ("e|t|l", 1, "'e' is none"),
]


@pytest.mark.parametrize(("text", "stages"), READ)
def test_parse(text, stages):
    assert parse(text) == stages


@pytest.mark.parametrize(("text", "position", "why"), BROKEN)
def test_mistakes_have_a_position(text, position, why):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert f"position {position}:" in str(error.value) and why in str(error.value)


@given(st.lists(st.text("Etm", max_size=4), min_size=1, max_size=6))
def test_plain_stages_read_back(stages):
    assert parse("|".join(stages)) == tuple(stages)


@given(st.text("EtmL|", min_size=1, max_size=5), st.integers(1, 5))
def test_repetition_is_writing_out(group, count):
    assert parse(f"({group})*{count}") == parse(group * count)


@given(st.text("EtmL|()*,0123 x", max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        stages = parse(text)
    except ConfigError:
        return
    assert set("".join(stages)) <= set("EtmL")
