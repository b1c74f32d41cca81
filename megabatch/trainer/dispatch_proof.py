"""Before the first step, shows that DeepEP's dispatch gives an expert layer the results of all-to-all.

DeepEP's kernels run only on GPUs with NVLink or RDMA between them, where none of our tests ran. So each run that asks
for them compares, on its own GPUs and between its own ranks: the same made-up tokens, some of them padding, go through
one layer of each pipeline chunk with `moe_token_dispatcher_type=flex` and with `alltoall`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher
from torch import Tensor

from megabatch.errors import MegabatchError
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks

TOKENS, PADDING = 96, 32
"""Of each rank; ranks have the same number, and different tokens."""
TOLERANCE = 0.02
"""Relative L2 difference. bfloat16 has 8 bits, and sums over experts are rounded in another order."""
_RECOMPUTED = ("moe_layer_recompute", "shared_experts_recompute", "activation_recompute")
"""What megatron-core's expert layers and their parts call it (0.16)."""
logger = logging.getLogger(__name__)


def prove_dispatch(model: Model, ranks: Ranks) -> None:
    """Compares both dispatchers on the model's loaded weights. Does nothing without flex; collective with it.

    Raises: MegabatchError on every rank, with the figures of one that differs.
    """
    found: list[Faults] = []
    for chunk in model.chunks:
        layers = (one for one in chunk.modules() if isinstance(one, MoELayer))
        if (layer := next(layers, None)) is not None and isinstance(layer.token_dispatcher, MoEFlexTokenDispatcher):
            found.append(compare(layer, seed=ranks.rank, device=ranks.device))
    error = next((MegabatchError(one.describe()) for one in found if one.describe()), None)
    if model.config.moe_token_dispatcher_type == "flex":
        ranks.raise_together(error)
        if found:
            logger.info(
                "flex dispatch gives the layer's outputs and gradients of alltoall within %.1e and %.1e",
                max(one.output for one in found),
                max(one.gradient for one in found),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """How far two dispatchers are apart on one layer of this rank."""

    output: float
    """Relative L2 difference."""
    gradient: float
    """The same, of the gradient of the layer's input."""
    counts: tuple[list[int], list[int]]
    """Tokens that each local expert computed, flex's first. Padding is among neither."""

    def describe(self) -> str:
        """Empty where they agree."""
        if self.counts[0] == self.counts[1] and self.output <= TOLERANCE and self.gradient <= TOLERANCE:
            return ""
        return (
            "moe.moe_token_dispatcher_type=flex does not give a layer of experts the results of alltoall here: "
            f"outputs differ by {self.output:.2g} and gradients by {self.gradient:.2g} (relative; at most "
            f"{TOLERANCE:g}), and experts got {self.counts[0]} tokens, with alltoall {self.counts[1]}. Use alltoall, "
            "and check the version of deep_ep"
        )


def compare(layer: Any, *, seed: int, device: torch.device) -> Faults:
    """Collective over the ranks that share the layer's experts."""
    made = torch.Generator(device).manual_seed(1_000 + seed)
    dtype = layer.config.params_dtype
    shape = (TOKENS, 1, layer.config.hidden_size)
    hidden, weight = (torch.randn(shape, generator=made, device=device).to(dtype) for _ in range(2))
    padding = torch.arange(TOKENS, device=device)[None] >= TOKENS - PADDING
    flex = layer.token_dispatcher
    runs = []
    with _plain(layer):
        for dispatcher in (flex, _alltoall(layer)):
            layer.token_dispatcher = dispatcher
            try:
                runs.append(_run(layer, hidden.clone().requires_grad_(), weight, padding))
            finally:
                layer.token_dispatcher = flex
    (output, gradient, counts), (its_output, its_gradient, its_counts) = runs
    return Faults(
        output=_apart(output, its_output), gradient=_apart(gradient, its_gradient), counts=(counts, its_counts)
    )


def _run(layer: Any, hidden: Tensor, weight: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    counts: list[int] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, arguments: counts.extend(arguments[1].tolist()))
    try:
        with torch.enable_grad():
            output, _ = layer(hidden, padding_mask=padding)
            (gradient,) = torch.autograd.grad((output.float() * weight.float()).sum(), hidden)
    finally:
        hook.remove()
    return output.detach(), gradient, counts


def _alltoall(layer: Any) -> MoEAlltoAllTokenDispatcher:
    flex = layer.token_dispatcher
    groups: Any = SimpleNamespace(ep=flex.ep_group, expt_tp=flex.tp_group, tp_ep=flex.tp_ep_group)
    return MoEAlltoAllTokenDispatcher(
        layer.num_local_experts, layer.local_expert_indices, config=layer.config, pg_collection=groups
    )


@contextmanager
def _plain(layer: Any) -> Iterator[None]:
    """Without balancing losses, which would be counted, and recomputation, which takes no `torch.autograd.grad`."""
    trains = layer.training
    recomputed = [(one, name) for one in layer.modules() for name in _RECOMPUTED if getattr(one, name, False)]
    layer.eval()
    for module, name in recomputed:
        setattr(module, name, False)
    try:
        yield
    finally:
        layer.train(trains)
        for module, name in recomputed:
            setattr(module, name, True)


def _apart(one: Tensor, other: Tensor) -> float:
    size = other.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((one.float() - other.float()).norm() / size)
