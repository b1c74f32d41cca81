"""What the log tells of an evaluation."""

from __future__ import annotations

from megabatch.trainer.sums import Ratio
from megabatch.trainer.watching.metrics import told


def test_a_mean_over_nothing_is_not_defined() -> None:
    metrics = {"loss": Ratio(3.0, 2.0), "pair_accuracy": Ratio(0.0, 0.0)}
    assert told(metrics) == "loss 1.500000, pair_accuracy not defined"
