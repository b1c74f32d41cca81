"""The reward model's loss: by hand, and TRL's own `compute_loss` on the same rewards."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.rm import Rm
from megabatch.trainer.pack import Pack, collate

MARGINS = (0.0, 0.5, -0.25)
REWARDS = (1.0, -0.5, 0.25, 0.75, 2.0, 1.5)
"""Chosen and rejected of each pair."""


def pack() -> Pack:
    samples = [
        Sample(np.arange(3, dtype=np.int32), np.ones(3, np.float32), {"chosen": float(not side), "margin": margin})
        for margin in MARGINS
        for side in (0, 1)
    ]
    return collate(samples, items=[0, 0, 1, 1, 2, 2])


def of(center: float | None) -> tuple[Any, torch.Tensor]:
    rewards = torch.tensor(REWARDS)[:, None].requires_grad_()
    return Rm(center_rewards_coefficient=center).terms({"scores": rewards}, pack()), rewards


def test_loss_and_metrics_by_hand() -> None:
    terms, _ = of(0.1)
    gaps = [REWARDS[2 * i] - REWARDS[2 * i + 1] for i in range(3)]
    sums = [REWARDS[2 * i] + REWARDS[2 * i + 1] for i in range(3)]
    expected = sum(math.log1p(math.exp(m - gap)) + 0.1 * s * s for gap, m, s in zip(gaps, MARGINS, sums, strict=True))
    assert float(terms.numerator.detach()) == pytest.approx(expected, rel=1e-6)
    found = {name: float(mean.total / mean.count) for name, mean in terms.metrics.items()}
    assert found == pytest.approx(
        {"loss": expected / 3, "accuracy": 2 / 3, "margin": sum(gaps) / 3, "mean_reward": sum(REWARDS) / 6}
    )


@pytest.mark.parametrize("center", [None, 0.01])
def test_loss_gradient_and_metrics_are_those_of_trl(center: float | None) -> None:
    trainer = pytest.importorskip("trl.trainer.reward_trainer")
    terms, rewards = of(center)
    (terms.numerator / 3).backward()
    theirs = torch.tensor([*REWARDS[0::2], *REWARDS[1::2]])[:, None].requires_grad_()
    accelerator = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    this = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=accelerator, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    loss = trainer.RewardTrainer.compute_loss(
        this, lambda **_: SimpleNamespace(logits=theirs), {"margin": torch.tensor(MARGINS)}
    )
    loss.backward()
    assert float(terms.numerator.detach()) / 3 == pytest.approx(float(loss.detach()), rel=1e-6)
    assert theirs.grad is not None and rewards.grad is not None
    own = torch.cat([rewards.grad[0::2], rewards.grad[1::2]])
    torch.testing.assert_close(own, theirs.grad, rtol=1e-6, atol=1e-8)
    for name in ("accuracy", "margin", "mean_reward"):
        mean = terms.metrics[name]
        assert float(mean.total / mean.count) == pytest.approx(this._metrics["eval"][name][0], rel=1e-6), name
