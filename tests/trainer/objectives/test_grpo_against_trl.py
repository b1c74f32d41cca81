"""The losses that TRL has, against TRL's own `_compute_loss`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from completions import LONGEST, computed, made, settings

trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def trl_loss(found: Any, grpo: Any) -> torch.Tensor:
    """One micro-batch that is the whole step."""
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda values, **_: values, gather=lambda values: values, device="cpu",
        pad_across_processes=lambda values, **_: values,
    )  # fmt: skip
    arguments = SimpleNamespace(
        use_bias_correction_kl=False, delta=grpo.delta, sapo_temperature_pos=grpo.tau_pos,
        sapo_temperature_neg=grpo.tau_neg, steps_per_generation=1,
    )  # fmt: skip
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (found.logps, found.entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=grpo.top_entropy_quantile,
        get_high_entropy_mask=lambda *given: trainer.GRPOTrainer.get_high_entropy_mask(this, *given),
        off_policy_mask_threshold=None,
        importance_sampling_level=grpo.importance_sampling_level,
        beta=grpo.beta,
        args=arguments,
        loss_type=grpo.loss_type,
        epsilon_low=grpo.epsilon,
        epsilon_high=grpo.epsilon_high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(found.mask), 1), "prompt_mask": torch.ones(len(found.mask), 1),
        "completion_ids": torch.zeros_like(found.mask), "completion_mask": found.mask,
        "advantages": found.advantages, "old_per_token_logps": found.old, "ref_per_token_logps": found.reference,
        "importance_sampling_ratio": torch.ones_like(found.mask), "num_items_in_batch": found.mask.sum(),
    }  # fmt: skip
    loss: torch.Tensor = trainer.GRPOTrainer._compute_loss(this, None, inputs)
    return loss


CASES = [
    (loss, level, fields)
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
    for level in ("token", "sequence")
    for fields in ({}, {"beta": 0.0}, {"delta": 1.9}, {"top_entropy_quantile": 0.3})
]


@pytest.mark.parametrize(("loss", "level", "fields"), CASES)
def test_loss_and_gradient_are_those_of_trl(loss: str, level: str, fields: dict[str, Any]) -> None:
    found, grpo = made(overlong=True), settings(loss, importance_sampling_level=level, **fields)
    logps = found.logps.clone().requires_grad_()
    expected = trl_loss(replace(found, logps=logps), grpo)
    gradient = torch.autograd.grad(expected, logps)[0]
    got, got_gradient, _ = computed(found, grpo)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)
