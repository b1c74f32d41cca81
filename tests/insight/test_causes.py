"""Each row of the table recognises what is really printed, and no other row takes it away."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.insight.causes import CAUSES
from megabatch.insight.evidence import search

EXCERPTS = [
    tuple(line.split("\t", 1))
    for line in Path(__file__).with_name("excerpts.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
INNOCENT = (
    "2026-11-21 10:00:00 rank 0 INFO step 12 of 30, loss 2.31, grad norm 0.8, lr 5.0e-04, 6134 tokens/s",
    "2026-11-21 10:00:00 rank 0 WARNING parallel.sequence_parallel has no effect with tensor_model_parallel_size=1",
    "Traceback (most recent call last):",
    '  File "/venv/lib/torch/nn/modules/module.py", line 1740, in _call_impl',
    "UserWarning: The given NumPy array is not writable (error: none)",
    '{"stopped": "SIGUSR2"}',
)
"""What every log holds, and says nothing of a failure."""


@pytest.mark.parametrize(("name", "line"), EXCERPTS)
def test_an_excerpt_gets_its_class(name: str, line: str) -> None:
    found = search("\n".join([*INNOCENT, line, *INNOCENT]))
    assert found is not None
    assert (found[0].name, found[1], found[2]) == (name, line, len(INNOCENT) + 1)


def test_every_row_has_an_excerpt_that_needs_it() -> None:
    needed = {search(line)[0] for _, line in EXCERPTS if search(line)}  # type: ignore[index]
    assert [cause.title for cause in CAUSES if cause not in needed] == []


@pytest.mark.parametrize("line", INNOCENT)
def test_what_every_log_holds_is_no_cause(line: str) -> None:
    assert search(line) is None


def test_a_cause_goes_before_a_consequence_wherever_it_stands() -> None:
    by_name = dict(EXCERPTS)
    found = search(f"{by_name['communication']}\n{by_name['timeout']}\n{by_name['oom_gpu']}")
    assert found is not None and found[0].name == "oom_gpu"


def test_lines_of_an_earlier_start_do_not_count() -> None:
    line = next(line for name, line in EXCERPTS if name == "time_limit")
    assert search(line, since=4e9) is None
    assert search(line, since=1e9) is not None
