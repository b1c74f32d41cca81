"""What is trained of a model that is frozen in part, as megatron-core's sharded tensors; adapters among it.

megatron-core's layers do not know the adapters attached to them, and they stack all layers in one tensor, which the
trained layers alone do not fill. So the table says how each tensor is split, and each layer has its own keys, in the
form that the converters read (`adapters/mcore_folder`); experts are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megabatch.converters.mapping import Mapped
from megabatch.converters.torch_dist.keys import Cell, cell
from megabatch.trainer.checkpoints.replicas import group_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.layers import TRAINED
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import Placed, placed, tensor_split


def trained_tensors(model: Model, ranks: Ranks) -> dict[str, nn.Parameter]:
    """This rank's trained parameters, by the names that `trained_state` uses."""
    return {_name(item.mapped): item.parameter for item in _trained(model, ranks)}


def trained_state(model: Model, ranks: Ranks) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The place of each trained parameter in its global tensor."""
    return {_name(item.mapped): _sharded(item, model, ranks) for item in _trained(model, ranks)}


def adapter_tensors(model: Model, ranks: Ranks, name: str) -> dict[str, nn.Parameter]:
    """This rank's parameters of a frozen adapter on the trained one's layers, by `adapter_state`'s names."""
    return {_name(item.mapped): item.parameter for item in _of_adapter(model, ranks, name)}


def adapter_state(
    model: Model, ranks: Ranks, name: str, *, prefix: str
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The place of each of them in its global tensor, whose key begins with `prefix`."""
    return {_name(item.mapped): _sharded(item, model, ranks, prefix) for item in _of_adapter(model, ranks, name)}


def _of_adapter(model: Model, ranks: Ranks, name: str) -> list[Placed]:
    return list(placed(model, model.others[name].table, ranks, adapter=name))


def _trained(model: Model, ranks: Ranks) -> list[Placed]:
    tuning = model.tuning
    own = [item for item in placed(model, tuning.table, ranks) if item.mapped.name in tuning.trained]
    return own if tuning.lora is None else [*placed(model, tuning.lora.table, ranks, adapter=TRAINED), *own]


def _name(mapped: Mapped) -> str:
    return mapped.name if mapped.expert is None else f"{mapped.name}[{mapped.expert}]"


def _sharded(item: Placed, model: Model, ranks: Ranks, prefix: str = "") -> ShardedTensor | ShardedTensorFactory:
    mapped = item.mapped
    rank, size = tensor_split(mapped, ranks)
    whole, stage = mapped.split == "replicated", int(item.is_copy)
    copies = (stage, rank if whole else 0, dist.get_rank(group_of(item.parameter, ranks)))
    cut = _Cut(cell(mapped, model.shape, stacked=False), mapped, rank, size)
    key = prefix + cut.place.key
    if cut.sections == 1 and not cut.turned:
        return cut.tensor(key, item.parameter, copies)
    return ShardedTensorFactory(key, item.parameter, cut.parts, cut.joined, copies)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One rank's part of a tensor: an equally long part of each of its sections."""

    place: Cell
    mapped: Mapped
    rank: int
    size: int

    @property
    def sections(self) -> int:
        return len(self.mapped.sections) if self.mapped.split == "column" else 1

    @property
    def turned(self) -> bool:
        """Whether the checkpoint holds the transpose: true for an embedding's A, as in PEFT."""
        return self.mapped.name.endswith("lora_embedding_A")

    def tensor(self, key: str, data: Tensor, copies: Any, section: int = 0) -> ShardedTensor:
        """This rank's part of one section."""
        axis = len(self.place.lead)
        lead = ((i, at, of) for i, (at, of) in enumerate(zip(self.place.lead, self.place.axes, strict=True)))
        rows = (axis + self.turned, section * self.size + self.rank, self.sections * self.size)
        cuts = {"replicated": [], "row": [(axis + 1, self.rank, self.size)]}.get(self.mapped.split, [rows])
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *lead,
            *cuts,
            replica_id=copies,
            prepend_axis_num=axis,
            allow_shape_mismatch=self.mapped.split == "vocab",
        )

    def parts(self, key: str, data: Tensor, copies: Any, *_: Any) -> list[ShardedTensor]:
        chunks = [data.detach().t().contiguous()] if self.turned else data.detach().chunk(self.sections)
        return [self.tensor(key, chunk, copies, section) for section, chunk in enumerate(chunks)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0].t() if self.turned else torch.cat(parts)
