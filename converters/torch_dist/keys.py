"""megatron-core's names on disk: canonical tensors as cells of stacked tensors, or one key for each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from megabatch.converters.mapping import Mapped
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_HAS_STATE = re.compile(r".*\.(?:linear_\w+|eh_proj|in_proj|out_proj|core_attention)\.")
_EXPERTS, _EXPERTS_ON_DISK = "mlp.experts.", "mlp.experts.experts."


@dataclass(frozen=True, slots=True)
class Cell:
    """Where an unsharded canonical tensor lies in a checkpoint: one index of a key's leading dimensions."""

    key: str
    lead: tuple[int, ...]
    """Its index: layer and expert, where the key stacks them."""
    axes: tuple[int, ...]
    """The sizes of the leading dimensions."""


LayerKeys = Literal["stacked", "per_layer"]


def stacks_layers(shape: ModelShape, wanted: LayerKeys | None = None) -> bool:
    """Whether megatron-core stacks the layers under one key: it does when all are alike, unless `moe_layer_freq` is a
    list, which a model in which every layer has experts may be run with; `wanted` says which.

    Layers of multi-token prediction have keys of their own always.
    Raises: ConversionError when layers that differ are wanted stacked.
    """
    alike = _all_alike(shape)
    if wanted == "stacked" and not alike:
        raise ConversionError(
            f"layer_keys=stacked: the layers of this {shape.architecture} differ, and megatron-core stacks none of "
            "them; leave it out"
        )
    return alike if wanted is None else wanted == "stacked"


def _all_alike(shape: ModelShape) -> bool:
    if any(shape.linear_attention_layers):
        return False
    return not shape.moe_layers or all(shape.moe_layers) or not any(shape.moe_layers)


def cell(mapped: Mapped, shape: ModelShape, *, stacked: bool) -> Cell:
    """The cell of a canonical tensor."""
    key = mapped.name
    lead: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    if mapped.expert is not None:
        key = key.replace(_EXPERTS, _EXPERTS_ON_DISK)
        lead, axes = (mapped.expert,), (shape.num_experts or 0,)
    if stacked and mapped.layer is not None:
        key = _LAYER.sub("decoder.layers.", key)
        return Cell(key, (mapped.layer, *lead), (shape.num_layers, *axes))
    return Cell(key, lead, axes)


def extra_states(tensors: Iterable[Mapped], shape: ModelShape, *, stacked: bool) -> Iterator[str]:
    """Keys of the empty `_extra_state` objects that strict loading asks for: one for each linear layer, and one for
    each attention with parameters of its own."""
    seen: set[str] = set()
    for mapped in tensors:
        module = _HAS_STATE.match(mapped.name)
        if module is None:
            continue
        place = cell(mapped, shape, stacked=stacked)
        at = ".".join(map(str, place.lead or (0,)))
        of = ".".join(map(str, place.axes or (1,)))
        prefix = place.key[: len(place.key) - len(mapped.name) + module.end()]
        state = f"{prefix}_extra_state/shard_{at}_{of}"
        if state not in seen:
            seen.add(state)
            yield state
