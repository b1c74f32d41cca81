"""LoRA's adapters as separate tensors beside the weights (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.plan.settings import Lora
from megabatch.plan.weights import Weight

_NOT_LINEAR = ("word_embeddings", "output_layer", "router", "gate_weight", "conv1d", "eh_proj")
"""Matrices that `all-linear` does not mean."""


def beside(weight: Weight, lora: Lora) -> Iterator[Weight]:
    """What is trained beside a frozen weight: an adapter's two matrices, or a copy of it; often nothing.

    The adapter of a matrix that is cut by rows or columns is cut there; the other of its two is on every rank.
    """
    module = weight.name.removesuffix(".weight").removesuffix(".bias")
    if lora.saved and module.endswith(tuple(lora.saved)):
        yield weight
    elif weight.cols is not None and is_target(module, lora):
        by_row = weight.split == "row"
        yield Weight(
            f"{module}.lora_A.weight", lora.rank, weight.cols, "row" if by_row else "replicated", weight.experts
        )
        yield Weight(
            f"{module}.lora_B.weight", weight.rows, lora.rank, "replicated" if by_row else weight.split, weight.experts
        )


def is_target(module: str, lora: Lora) -> bool:
    """Whether a module, by its name or the end of it, gets an adapter."""
    for name in lora.targets:
        if name == "all-linear":
            if not module.endswith(_NOT_LINEAR):
                return True
        elif module.endswith("router" if name == "all-router" else name):
            return True
    return False
