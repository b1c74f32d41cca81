"""Muon for a model's hidden matrices and AdamW for the rest, as one of megatron-core's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from megabatch.converters.mapping import Mapped
from megabatch.trainer.model.build import Model
from megabatch.trainer.muon import Matrix, Muon, Rule
from megabatch.trainer.weights import placed

_SPLIT = {"column": 0, "row": 1, "replicated": None}
_ENDS = ("embedding.", "output_layer.")
"""What names of the model's ends begin with; a head's is that of the output layer."""


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates a parameter: any matrix but the embedding, the output layer and a head; routers too, as in
    megatron-core (0.16.1). Args: name: the table's."""
    return len(shape) == 2 and not name.startswith(_ENDS)


def matrices_of(model: Model, table: Sequence[Mapped], *, split_qkv: bool) -> dict[nn.Parameter, Matrix]:
    """The trained parameters that Muon updates. Args: table: of the model's tensors; split_qkv: queries, keys and
    values are a matrix each.

    The table says how tensors are split. megatron-core reads the marks of layers, which Transformer Engine sets also
    where ranks have the same tensor.
    """
    found = {}
    for item in placed(model, table, model.ranks):
        mapped = item.mapped
        if not item.parameter.requires_grad or not is_hidden_matrix(mapped.name, mapped.shape):
            continue
        is_expert = mapped.expert is not None
        group = model.ranks.state.get_expert_tensor_parallel_group() if is_expert else model.ranks.tp
        fused = split_qkv and mapped.name.endswith("linear_qkv.weight")
        found[item.parameter] = Matrix(_SPLIT[mapped.split], group, _parts(mapped) if fused else ())
    return found


def _parts(mapped: Mapped) -> tuple[Tensor, ...]:
    """Of each Hugging Face tensor, in the order in which they come first, its rows in the fused one."""
    rows: dict[str, list[Tensor]] = {}
    start = 0
    for piece in mapped.pieces:
        rows.setdefault(piece.hf, []).append(torch.arange(start, start + piece.count))
        start += piece.count
    return tuple(torch.cat(one) for one in rows.values())


def muon_and_adam(
    config: OptimizerConfig, model: Model, rule: Rule, matrices: dict[nn.Parameter, Matrix]
) -> ChainedOptimizer:
    """megatron-core's optimizers of the matrices and of the other parameters, and among both of experts' and others.

    megatron-core wraps SGD, whose place Muon then takes, so that main parameters, groups and norms are its own.
    """
    others = [p for chunk in model.chunks for p in chunk.parameters() if p.requires_grad and p not in matrices]
    config.optimizer = "adam"  # one config for all: a chain compares them
    with _frozen(matrices):
        adam = get_megatron_optimizer(config, model.wrapped)
    config.optimizer = "sgd"
    with _frozen(others):
        sgd = get_megatron_optimizer(config, model.wrapped)
    config.optimizer = "adam"
    for inner in sgd.chained_optimizers:  # one of dense parameters, one of experts
        if inner.optimizer is not None:
            inner.optimizer = _muon(inner, rule, matrices)
    return ChainedOptimizer([*adam.chained_optimizers, *sgd.chained_optimizers])


def _muon(inner: Any, rule: Rule, matrices: dict[nn.Parameter, Matrix]) -> Muon:
    """Muon on the parameters of a wrapped SGD."""
    of_the_model = model_parameters(inner)
    kept = {"lr", "weight_decay"}
    groups = [
        {name: value for name, value in group.items() if name in kept or name not in inner.optimizer.defaults}
        for group in inner.optimizer.param_groups
    ]
    found = {main: matrices[of_the_model.get(main, main)] for group in groups for main in group["params"]}
    return Muon(groups, rule, found)


def model_parameters(inner: Any) -> dict[Tensor, nn.Parameter]:
    """Main parameter → the model's, for the half-precision ones of an optimizer that is not the distributed one; fp32
    parameters are their own."""
    pairs = zip(getattr(inner, "fp32_from_float16_groups", ()), getattr(inner, "float16_groups", ()), strict=True)
    return {main: own for mains, owns in pairs for main, own in zip(mains, owns, strict=True)}


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside this context megatron-core gives these parameters no optimizer."""
    found = list(parameters)
    for parameter in found:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_(True)
