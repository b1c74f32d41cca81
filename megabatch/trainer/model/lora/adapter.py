"""One layer's adapter: scale * B A x beside a frozen layer of megatron-core's (LoRA, arXiv:2106.09685, eq. 3).

Ranks exchange only z = A x, which is as wide as the adapter's rank, never x:

- column split: every rank has A; B is split by rows. z is gathered with sequence parallelism, else copied.
- row split: A is split by columns; every rank has B. z is summed, or reduce-scattered with sequence parallelism.
- experts: the same over expert tensor parallelism, without collectives. Each rank's part of the sum is right by
  itself; the gradient of the matrix that every rank has is summed once per step (`gradients`).

T: tokens of a row or its part on this rank. R: adapter rank times number of A. O, I: rows and columns of the
layer's weight on this rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from torch import Tensor, nn
from torch.nn import functional

from megabatch.converters.adapters.targets import Target
from megabatch.converters.mapping import Mapped
from megabatch.converters.shards import shard_reads, shard_shape

SUMMED = "summed_over_expert_tensor_parallel"
"""Marks a parameter whose gradient `gradients.finalize` sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """How ranks share a layer."""

    group: Any
    """The tensor-parallel group; for experts, the expert-tensor-parallel group."""
    sequence_parallel: bool
    is_expert: bool
    padded_vocab: int
    """Rows of the vocabulary, padding included."""

    @property
    def rank(self) -> int:
        return int(self.group.rank())

    @property
    def size(self) -> int:
        return int(self.group.size())


class Adapter(nn.Module):
    """A and B of one layer; adds scale * B A x to its output. Subclasses know how the layer is split."""

    def __init__(self, target: Target, weight: Tensor, place: Place, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.place, self.scale, self.dropout = place, scale, dropout
        self.A, self.B = (_parameter(mapped, weight, place) for mapped in (target.a, target.b))
        self._mark()

    def forward(self, x_TI: Tensor, out_TO: Tensor) -> Tensor:
        """Returns: `out` plus the adapter's term, [..., O]."""
        z_TR = self._exchanged(functional.linear(self.dropped(x_TI), self.A))
        added = torch.addmm(_flat(out_TO), _flat(z_TR), self.wide_b().t(), alpha=self.scale)
        return added.view_as(out_TO)

    def wide_b(self) -> Tensor:
        """[O, R]: B expanded to all rows of the layer, with zeros where row and column belong to different parts."""
        return self.B

    def merged(self, weight_OI: Tensor) -> Tensor:
        """This rank's part of the weight with the adapter merged in, summed in fp32 without communication."""
        sum_OI = torch.addmm(weight_OI.float(), self.wide_b().float(), self.A.float(), alpha=self.scale)
        return sum_OI.to(weight_OI.dtype)

    def _exchanged(self, z_TR: Tensor) -> Tensor:
        return z_TR

    def _mark(self) -> None:
        """Marks how megatron-core reduces each matrix's gradient and counts it in the norm."""
        raise NotImplementedError

    def dropped(self, x_TI: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x_TI
        with self._generator():
            return functional.dropout(x_TI, self.dropout)

    def _generator(self) -> Any:
        """The generator for dropout: ranks with the same input drop the same elements, others draw independently."""
        if self.place.is_expert:
            return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
        return get_cuda_rng_tracker().fork() if self._has_own_input() else nullcontext()

    def _has_own_input(self) -> bool:
        return self.place.sequence_parallel


class Column(Adapter):
    """For a layer split by rows: `linear_qkv`, `linear_fc1`, the output layer."""

    def __init__(self, target: Target, weight: Tensor, place: Place, *, scale: float, dropout: float) -> None:
        super().__init__(target, weight, place, scale=scale, dropout=dropout)
        self._height = weight.shape[0]
        rows, belongs = _parts_of_rows(target, weight, place)
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("_belongs", belongs, persistent=False)

    def wide_b(self) -> Tensor:
        B, rows, belongs = self.B, self._buffers["_rows"], self._buffers["_belongs"]
        if belongs is not None:
            B = (B[:, None, :] * belongs[:, :, None]).flatten(1)
        return B if rows is None else B.new_zeros(self._height, B.shape[1]).index_copy(0, rows, B)

    def _exchanged(self, z_TR: Tensor) -> Tensor:
        if self.place.is_expert or self.place.size == 1:
            return z_TR
        if self.place.sequence_parallel:
            return gather_from_sequence_parallel_region(z_TR, group=self.place.group)
        return copy_to_tensor_model_parallel_region(z_TR, group=self.place.group)

    def _mark(self) -> None:
        _mark_cut(self.B, 0, self.place)
        _mark_whole(self.A, self.place)


class Row(Adapter):
    """For a layer split by columns: `linear_proj`, `linear_fc2`."""

    def _exchanged(self, z_TR: Tensor) -> Tensor:
        return z_TR if self.place.is_expert else _summed(z_TR, self.place)

    def _mark(self) -> None:
        _mark_cut(self.A, 1, self.place)
        _mark_whole(self.B, self.place)

    def _has_own_input(self) -> bool:
        return self.place.size > 1


class Router(Adapter):
    """For a router, which every rank has in full and which computes its scores in a dtype of its own."""

    def forward(self, x_TI: Tensor, out_TO: Tensor) -> Tensor:
        z_TR = functional.linear(x_TI.to(out_TO.dtype), self.A.to(out_TO.dtype))
        return out_TO + self.scale * functional.linear(z_TR, self.B.to(out_TO.dtype))

    def _mark(self) -> None:
        _mark_whole(self.A, self.place)
        _mark_whole(self.B, self.place)


class Embedding(Adapter):
    """For the embedding: A is stored transposed, [vocabulary on this rank, R]; B is [O, R]."""

    def forward(self, x_TI: Tensor, out_TO: Tensor) -> Tensor:
        """Args: x: token ids."""
        first, height = self.place.rank * self.A.shape[0], self.A.shape[0]
        own = (x_TI >= first) & (x_TI < first + height)
        z_TR = functional.embedding((x_TI - first) * own, self.A) * own[..., None]
        z_TR = z_TR.transpose(0, 1).contiguous() if self.place.sequence_parallel else z_TR
        added = torch.addmm(_flat(out_TO), _flat(_summed(z_TR, self.place)), self.B.t(), alpha=self.scale)
        return added.view_as(out_TO)

    def merged(self, weight_OI: Tensor) -> Tensor:
        sum_OI = torch.addmm(weight_OI.float(), self.A.float(), self.B.t().float(), alpha=self.scale)
        return sum_OI.to(weight_OI.dtype)

    def _mark(self) -> None:
        _mark_cut(self.A, 0, self.place)
        _mark_whole(self.B, self.place)


def _parameter(mapped: Mapped, weight: Tensor, place: Place) -> nn.Parameter:
    padded = place.padded_vocab if mapped.split == "vocab" else None
    shape = shard_shape(mapped, tp_size=place.size, padded_vocab=padded)
    return nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))


def _parts_of_rows(target: Target, weight: Tensor, place: Place) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of this rank's weight the adapter changes, and to which part each belongs.

    Returns: int64 [adapted rows], None for all; ones and zeros [adapted rows, parts], None where one A is for all.
    """
    if target.weight.split == "vocab":
        return None, None
    rows: list[int] = []
    parts: list[int] = []
    for read in shard_reads(target.weight, tp_rank=place.rank, tp_size=place.size):
        if (layer := read.hf.removesuffix(".weight")) in target.parts:
            count = read.rows[1] - read.rows[0]
            rows += range(read.dest_row, read.dest_row + count)
            parts += [target.parts.index(layer)] * count
    device, is_whole = weight.device, len(rows) == weight.shape[0]
    is_one = target.fused or len(target.parts) == 1
    belongs = functional.one_hot(torch.tensor(parts), len(target.parts)).to(device, weight.dtype)
    return None if is_whole else torch.tensor(rows, device=device), None if is_one else belongs


def _summed(z_TR: Tensor, place: Place) -> Tensor:
    """Sums over the ranks of a group; with sequence parallelism each rank keeps only its part of the row."""
    if place.size == 1:
        return z_TR
    if place.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(z_TR, group=place.group)
    return reduce_from_tensor_model_parallel_region(z_TR, group=place.group)


def _mark_cut(parameter: nn.Parameter, dim: int, place: Place) -> None:
    set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    if place.is_expert:
        parameter.allreduce = False


def _mark_whole(parameter: nn.Parameter, place: Place) -> None:
    """Marks a matrix that every rank of the group has. For experts, whose gradients are reduced over other ranks, only
    the first rank counts it in the norm; for everything else megatron-core does this itself."""
    marked: Any = parameter
    if place.is_expert:
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        marked.allreduce, marked.shared = False, place.rank > 0
        setattr(parameter, SUMMED, place.size > 1)
    else:
        marked.sequence_parallel = place.sequence_parallel


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
