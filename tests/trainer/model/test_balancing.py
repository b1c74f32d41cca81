"""How megatron-core's balancing loss compares with transformers', as docs/recipes.md says."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

EXPERTS, TOPK, TOKENS = 8, 2, 40


def of_layers(layers: list[torch.Tensor]) -> float:
    """Sum over layers of E / (topk T^2) sum_i n_i sum_t p_ti, which is what a coefficient of 1 adds to the loss."""
    total = 0.0
    for logits_TE in layers:
        probs_TE = logits_TE.softmax(-1)
        counts_E = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(TOPK).indices, 1).sum(0)
        total += float(switch_load_balancing_loss_func(probs_TE, counts_E, TOKENS, TOPK, EXPERTS, 1.0))
    return total


@pytest.mark.parametrize("layers", [1, 3])
def test_a_coefficient_is_carried_over_by_topk_and_layers(layers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    theirs = float(load_balancing_loss_func((logits_TE,) * layers, EXPERTS, TOPK))
    assert of_layers([logits_TE] * layers) * TOPK / layers == pytest.approx(theirs, rel=1e-6)


def test_even_experts_give_1_a_layer_and_topk() -> None:
    even_TE = (
        torch.eye(EXPERTS).repeat(TOKENS // EXPERTS, 1) * 1e-4 + torch.eye(EXPERTS).roll(1, 0).repeat(5, 1) * 1e-4
    )
    assert of_layers([even_TE] * 3) == pytest.approx(3.0, rel=1e-3)
    assert float(load_balancing_loss_func((even_TE,) * 3, EXPERTS, TOPK)) == pytest.approx(TOPK, rel=1e-3)
