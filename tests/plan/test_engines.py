"""Memory of an engine beside a rank of the trainer, by hand."""

from __future__ import annotations

from megabatch.plan.engines import Engine, moments
from megabatch.plan.figures import MemoryEstimate

RANK = MemoryEstimate(weights=20, gradients=30, optimizer=50, activations=7, logits=3, temporary=2, framework=4)
AWAKE, SLEEPS = (Engine(weights=15, share=60, sleeps=sleeps) for sleeps in (False, True))


def totals(engine: Engine, *, model: bool, optimizer: bool, copies: int = 0) -> list[int]:
    found = moments(engine, RANK, offload_model=model, offload_optimizer=optimizer, frozen_copies=copies)
    assert list(found) == ["training", "sending", "generating"]
    return [one.total for one in found.values()]


def test_who_has_what_at_each_time() -> None:
    assert totals(AWAKE, model=False, optimizer=False) == [60 + 116, 60 + 104, 60 + 104]
    assert totals(SLEEPS, model=False, optimizer=False) == [116, 15 + 104, 60 + 104]
    assert totals(SLEEPS, model=False, optimizer=True) == [116, 15 + 104, 60 + 54]
    assert totals(SLEEPS, model=True, optimizer=True) == [116, 15 + 104, 60 + 4]
    assert totals(SLEEPS, model=True, optimizer=True, copies=1) == [116, 15 + 104, 60 + 10 + 4], "a reference stays"
