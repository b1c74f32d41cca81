"""Each row of the table recognises what is really printed, and no other row takes it away."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.insight.causes import CAUSES, CONSEQUENCES, TABLE, Source
from megabatch.insight.evidence import search

ALL_LOGS = "first,rank,script"
LINES = [
    tuple(text.replace("log\t", f"{ALL_LOGS}\t", 1).split("\t", 2))
    for text in Path(__file__).with_name("excerpts.txt").read_text().splitlines()
    if text and not text.startswith("#")
]
EXCERPTS = [(source, name, line) for sources, name, line in LINES for source in sources.split(",")]
FAULTS = Path(__file__).parents[2] / "docs" / "faults.md"
INNOCENT = (
    "2026-11-21 10:00:00 rank 0 INFO step 12 of 30, loss 2.31, grad norm 0.8, lr 5.0e-04, 6134 tokens/s",
    "2026-11-21 10:00:00 rank 0 WARNING parallel.sequence_parallel has no effect with tensor_model_parallel_size=1",
    "Traceback (most recent call last):",
    '  File "/venv/lib/torch/nn/modules/module.py", line 1740, in _call_impl',
    "UserWarning: The given NumPy array is not writable (error: none)",
    '{"stopped": "SIGUSR2"}',
    "UserWarning: CUDA initialization: Found no NVIDIA driver on your system. Please check that you have a GPU",
    "UserWarning: Failed to load image Python extension: '/venv/torchvision/image.so: undefined symbol: _ZN3c104cuda'",
    "n1:71:99 [0] NCCL INFO NET/IB : No device found.",
    "[2026-11-21 10:00:00] n1:71:99 [0] NCCL INFO NET/Socket : Using [0]ib0:10.0.0.1<0>",
    "[W1121 10:00:00.1 socket.cpp:764] [c10d] The IPv6 addresses of (n1, 29500) cannot be retrieved (gai error: "
    "-2 - Name or service not known).",
    "[rank1]:[W1121 10:00:00.1 socket.cpp:764] [c10d] The client socket has failed to connect to [n1]:29500.",
)
"""What every log holds, and says nothing of a failure."""


@pytest.mark.parametrize(("sources", "name", "line"), LINES)
def test_an_excerpt_gets_its_class(sources: str, name: str, line: str) -> None:
    for source in sources.split(","):
        found = search("\n".join([*INNOCENT, line, *INNOCENT]), (Source(source),))
        assert found is not None, source
        assert (TABLE[found[0]].cause, found[1], found[2]) == (name, line, len(INNOCENT) + 1), source


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda row: f"{row}-{TABLE[row].cause}")
def test_a_row_has_an_excerpt_that_no_row_above_it_takes(row: int) -> None:
    """From each source that it reads: so no row is dead, and the order of any two can be seen to matter or not."""
    taken = {(source, found[0]) for source, _, line in EXCERPTS if (found := search(line, (Source(source),)))}
    assert [source for source in TABLE[row].sources if (source, row) not in taken] == []


def test_every_class_has_a_row_one_fix_and_a_line_in_the_docs() -> None:
    assert {row.cause for row in TABLE} == set(CAUSES)
    assert len({cause.fix for cause in CAUSES.values()}) == len(CAUSES)
    text = FAULTS.read_text().partition("## Classes of failure")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{cause.name}` | {cause.title} | {cause.fix} |" for cause in CAUSES.values()]


@pytest.mark.parametrize("line", INNOCENT)
@pytest.mark.parametrize("source", [Source.FIRST, Source.RANK, Source.SCRIPT])
def test_what_every_log_holds_is_no_cause(source: Source, line: str) -> None:
    assert search(line, (source,)) is None


def test_a_cause_goes_before_a_consequence_wherever_it_stands() -> None:
    by_name = {name: line for source, name, line in EXCERPTS if source == Source.RANK}
    found = search("\n".join(by_name[name] for name in (*CONSEQUENCES, "oom_gpu")), (Source.RANK,))
    assert found is not None and TABLE[found[0]].cause == "oom_gpu"
