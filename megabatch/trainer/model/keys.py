"""Keys and values of a row that is cut over context-parallel ranks, gathered for one attention.

Shapes: t tokens of this rank's part, T of the row, K keys that this rank's queries see, G key/value heads, D channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megabatch.trainer.zigzag import Cut


@contextlib.contextmanager
def seen(key_tGD: Tensor, value_tGD: Tensor, cut: Cut | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [K, G, D] of the chunks' prefixes, concatenated; the arguments themselves if the row is whole.

    Computations inside this context save no keys or values of other ranks for the backward pass, which gathers them
    again. So besides its own keys and values, a rank holds those of one layer at a time.
    """
    if cut is None:
        yield key_tGD, value_tGD
        return
    key_KGD, value_KGD = _Seen.apply(key_tGD, value_tGD, cut)
    again = _Again(key_tGD.detach(), value_tGD.detach(), cut, key_KGD)
    with saved_tensors_hooks(again.pack, again.unpack):
        yield key_KGD, value_KGD


class _Seen(torch.autograd.Function):
    """Gathers in forward; in backward, sums each key's gradient over all ranks whose queries saw it."""

    @staticmethod
    def forward(ctx: Any, key_tGD: Tensor, value_tGD: Tensor, cut: Cut) -> tuple[Tensor, ...]:
        ctx.cut = cut
        return _gathered(key_tGD, value_tGD, cut).chunk(2, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        cut: Cut = ctx.cut
        grad_K2D = torch.cat(grads, dim=1)
        whole_T2D = grad_K2D.new_zeros(len(cut.places_T), *grad_K2D.shape[1:]).index_add_(0, cut.keys_K, grad_K2D)
        mine_t2D = grad_K2D.new_empty(len(cut.mine_t), *grad_K2D.shape[1:])
        dist.reduce_scatter_tensor(mine_t2D, whole_T2D, group=cut.group)
        key_tGD, value_tGD = mine_t2D.chunk(2, dim=1)
        return key_tGD, value_tGD, None


def _gathered(key_tGD: Tensor, value_tGD: Tensor, cut: Cut) -> Tensor:
    """[K, 2·G, D], keys before values."""
    mine_t2D = torch.cat((key_tGD, value_tGD), dim=1)
    whole_T2D = mine_t2D.new_empty(len(cut.places_T), *mine_t2D.shape[1:])
    dist.all_gather_into_tensor(whole_T2D, mine_t2D, group=cut.group)
    return whole_T2D.index_select(0, cut.keys_K)


class _Again:
    """Saves only the shape and offset of views of the gathered tensors, and gathers them again for backward."""

    def __init__(self, key_tGD: Tensor, value_tGD: Tensor, cut: Cut, gathered: Tensor) -> None:
        self._mine = (key_tGD, value_tGD, cut)
        self._storage = gathered.untyped_storage().data_ptr()
        self._saved = self._left = 0
        self._gathered: Tensor | None = None

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != self._storage:
            return tensor
        self._saved += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._gathered is None:
            self._gathered, self._left = _gathered(*self._mine), self._saved
        tensor = self._gathered.as_strided(*packed)
        self._left -= 1
        if not self._left:
            self._gathered = None
        return tensor
