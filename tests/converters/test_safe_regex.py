"""Regular expressions of others: the answers of `re`, and none that is waited for without end."""

from __future__ import annotations

import re
import threading
import time

import pytest

from megabatch.converters import safe_regex
from megabatch.converters.safe_regex import check_pattern, matches
from megabatch.errors import ConversionError

PATTERNS = (
    "q_proj", r".*\.gate_up_proj", r"model\.layers\.\d+\.(self_attn|mlp)\.[qkvogud]\w*_proj", "(a+)+b", "(a|a)*b",
    r"(\w+\.)*q_proj",
    "^(?!.*visual).*(q_proj|k_proj)$", "(?i).*Q_PROJ", ".*a.*b.*c.*d", r"(foo|bar)?x(y)?", "a{3}b?", r"(\w)\1", "",
)  # fmt: skip
NAMES = ("q_proj", "model.layers.3.self_attn.q_proj", "visual.q_proj", "aaab", "aaac", "x", "barxy", "abcd\n")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_re(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name) == (re.match(pattern, name) is not None), name
        assert matches(pattern, name, whole=True) == (re.fullmatch(pattern, name) is not None), name


ENDLESS = (r"(\w*)*$x", "(a|a)*b", r"(.*)*\1z", r".*.*.*.*.*.*.*.*.*.*.*.*x", r"((\w+\.?)+)+!")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_has_no_end_is_ended(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_regex, "LIMIT_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(ConversionError, match=r"takes longer than 0.2 s on 'a+'"):
        matches(pattern, "a" * 60)
    assert time.monotonic() - begun < 60
    monkeypatch.undo()
    assert matches("(a+)+b", "aab")  # the next question has an answer


def test_what_is_matched_here_is_quick() -> None:
    """The worst that has the form of those that need no process: three repeats and seven choices."""
    begun = time.process_time()
    assert safe_regex._is_quick(r"(a?)(b?)(c?)(d?)(e?)(f?)(g?)\w*\w*\w*!")
    assert not matches(r"(a?)(b?)(c?)(d?)(e?)(f?)(g?)\w*\w*\w*!", "abcdefg" + "a" * 100)
    assert time.process_time() - begun < 10


def test_threads_share_the_process() -> None:
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda at=at: found.append(matches("(a+)+b", "a" * at + "b"))) for at in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


@pytest.mark.parametrize("pattern", ["q_(proj", "a{99999999999}", "(" * 5000 + ")" * 5000, "a" * (1 << 21), "*"])
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(ConversionError, match="is not a regular expression"):
        check_pattern(pattern)
