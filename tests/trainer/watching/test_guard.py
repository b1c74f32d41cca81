"""What the guard finds in losses and gradient norms, and what it says."""

from __future__ import annotations

import math

import pytest

from megabatch.config.watching import Watching
from megabatch.trainer.sums import Ratio
from megabatch.trainer.watching.guard import Finding, Seen, Suspect, describe, judge, ranked, remembered, seen_in

SPIKES = Watching(check_for_spiky_loss="skip", spiky_loss_window=8, spiky_loss_sigma=3.0)
CALM = [Seen(2.0 + 0.1 * (-1) ** i, 1.0) for i in range(8)]


@pytest.mark.parametrize("step", [Seen(math.nan, 1.0), Seen(2.0, math.inf), Seen(-math.inf, math.nan)])
@pytest.mark.parametrize("action", ["stop", "skip", "warn"])
def test_numbers_that_are_none_are_found(step: Seen, action: str) -> None:
    settings = Watching(check_for_nan_in_loss_and_grad=action)  # type: ignore[arg-type]
    assert judge(settings, step, []) == Finding("not finite", action)  # type: ignore[arg-type]


def test_a_spike_is_so_many_deviations_above_the_mean() -> None:
    """Mean 2 and deviation 0.1: the limit is 2.3."""
    assert judge(SPIKES, Seen(2.29, 1.0), CALM) is None
    assert judge(SPIKES, Seen(2.31, 1.0), CALM) == Finding("a spike of the loss, above 2.3", "skip")
    assert judge(SPIKES, Seen(0.1, 1.0), CALM) is None, "a loss that falls is none"
    norms = [Seen(2.0, 4.0 + 0.5 * (-1) ** i) for i in range(8)]
    assert judge(SPIKES, Seen(2.0, 6.0), norms) == Finding("a spike of the gradient norm, above 5.5", "skip")


def test_spikes_are_looked_for_once_half_the_window_is_there() -> None:
    assert judge(SPIKES, Seen(9.0, 1.0), CALM[:3]) is None
    assert judge(SPIKES, Seen(9.0, 1.0), CALM[:4]) is not None
    assert judge(Watching(), Seen(9.0, 1.0), CALM) is None, "by default nobody looks"


def test_what_is_remembered() -> None:
    assert remembered(SPIKES, Seen(9.0, 1.0), CALM) == (*CALM[1:], (9.0, 1.0)), "a spike too"
    assert remembered(SPIKES, Seen(math.nan, 1.0), CALM) == tuple(CALM)
    assert remembered(Watching(), Seen(9.0, 1.0), ()) == ()


def test_a_step_that_learned_nothing_is_not_wrong_and_is_not_remembered() -> None:
    nothing = seen_in({"loss": Ratio(0.0, 0.0)}, 0.0)
    assert nothing == Seen(None, 0.0)
    assert judge(SPIKES, nothing, CALM) is None and remembered(SPIKES, nothing, CALM) == tuple(CALM)
    broken = seen_in({"loss": Ratio(math.nan, 0.0)}, 0.0)
    assert judge(SPIKES, broken, CALM) == Finding("not finite", SPIKES.check_for_nan_in_loss_and_grad)


def test_the_broken_micro_batches_are_named_alone_and_else_the_worst_first() -> None:
    low, high, broken = Suspect(0, 1.0, ("a:1",)), Suspect(2, 3.0, ("b:2",)), Suspect(1, math.nan, ("c:3",))
    assert ranked([low, broken, high]) == [broken]
    assert ranked([low, high]) == [high, low]


def test_a_message_names_sixteen_samples_and_counts_the_rest() -> None:
    suspects = [Suspect(3, 7.5, tuple(f"train.jsonl:{n}" for n in range(1, 21))), Suspect(0, 1.0, ("train.jsonl:99",))]
    text = describe(812, Seen(5.0, 9.0), Finding("a spike of the loss, above 3", "skip"), suspects, samples=21)
    assert text.startswith("the update of step 812 is skipped: loss=5.0, gradient norm=9.0 over 21 samples, a spike")
    assert "train.jsonl:16 (rank 3, loss 7.5) and 5 more, all in incidents.jsonl" in text and "jsonl:17" not in text
