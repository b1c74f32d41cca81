"""LoRA's adapters as separate tensors beside the weights (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.plan.settings import Lora
from megabatch.plan.weights import Weight

_NOT_LINEAR = ("word_embeddings", "output_layer", "router", "gate_weight", "conv1d", "eh_proj")
"""Matrices that `all-linear` excludes."""


_KINDS = {"all-router": "router", "all-embedding": "word_embeddings"}
_PARTS = {"linear_qkv": 3, "linear_fc1": 2}
"""Layers that are several of Hugging Face's, each with an A of its own unless the form is fused."""


def beside(weight: Weight, lora: Lora) -> Iterator[Weight]:
    """What is trained next to a frozen weight: an adapter's two matrices; often nothing.

    If the weight is cut by rows or columns, one of the adapter's matrices is cut so, too; the other is replicated.
    """
    module = weight.name.removesuffix(".weight").removesuffix(".bias")
    if weight.cols is not None and not is_saved(weight.name, lora) and is_target(module, lora):
        by_row, rank = weight.split == "row", lora.rank * matrices(module, lora)
        yield Weight(f"{module}.lora_A.weight", rank, weight.cols, "row" if by_row else "replicated", weight.experts)
        yield Weight(
            f"{module}.lora_B.weight", weight.rows, lora.rank, "replicated" if by_row else weight.split, weight.experts
        )


def matrices(module: str, lora: Lora) -> int:
    """How many A a layer has."""
    return 1 if lora.fused else _PARTS.get(module.rpartition(".")[2], 1)


def is_saved(name: str, lora: Lora) -> bool:
    """Whether a parameter is trained in full, in its own place."""
    return name.rpartition(".")[0].endswith(tuple(lora.saved)) if lora.saved else False


def is_target(module: str, lora: Lora) -> bool:
    """Whether a module, by its name or the end of it, gets an adapter."""
    for name in lora.targets:
        if name == "all-linear":
            if not module.endswith(_NOT_LINEAR):
                return True
        elif module.endswith(_KINDS.get(name, name)):
            return True
    return False
