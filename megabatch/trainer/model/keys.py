"""Keys and values that queries see beyond those beside them, gathered for one attention: of a row that is cut over
context-parallel ranks, or whose sequences share tokens.

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
def seen(
    key_tGD: Tensor, value_tGD: Tensor, keys_K: Tensor | None, cut: Cut | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [K, G, D] that the queries see, segment by segment. Args: as `Row` has them; without `keys_K`
    these are the keys and values themselves.

    Computations inside this context save no gathered keys or values for the backward pass, which gathers them again.
    So besides its own keys and values, a rank holds those of one layer at a time.
    """
    if keys_K is None:
        yield key_tGD, value_tGD
        return
    key_KGD, value_KGD = _Seen.apply(key_tGD, value_tGD, keys_K, cut)
    again = _Again(key_tGD.detach(), value_tGD.detach(), keys_K, cut, key_KGD)
    with saved_tensors_hooks(again.pack, again.unpack):
        yield key_KGD, value_KGD


class _Seen(torch.autograd.Function):
    """Gathers in forward; in backward, sums each key's gradient over all queries that saw it, on every rank."""

    @staticmethod
    def forward(ctx: Any, key_tGD: Tensor, value_tGD: Tensor, keys_K: Tensor, cut: Cut | None) -> tuple[Tensor, ...]:
        ctx.keys_K, ctx.cut, ctx.tokens = keys_K, cut, len(key_tGD)
        return _gathered(key_tGD, value_tGD, keys_K, cut).chunk(2, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cut: Cut | None = ctx.cut
        grad_K2D = torch.cat(grads, dim=1)
        tokens = ctx.tokens if cut is None else len(cut.places_T)
        mine_t2D = grad_K2D.new_zeros(tokens, *grad_K2D.shape[1:]).index_add_(0, ctx.keys_K, grad_K2D)
        if cut is not None:
            whole_T2D, mine_t2D = mine_t2D, grad_K2D.new_empty(ctx.tokens, *grad_K2D.shape[1:])
            dist.reduce_scatter_tensor(mine_t2D, whole_T2D, group=cut.group)
        key_tGD, value_tGD = mine_t2D.chunk(2, dim=1)
        return key_tGD, value_tGD, None, None


def _gathered(key_tGD: Tensor, value_tGD: Tensor, keys_K: Tensor, cut: Cut | None) -> Tensor:
    """[K, 2·G, D], keys before values."""
    mine_t2D = whole_T2D = torch.cat((key_tGD, value_tGD), dim=1)
    if cut is not None:
        whole_T2D = mine_t2D.new_empty(len(cut.places_T), *mine_t2D.shape[1:])
        dist.all_gather_into_tensor(whole_T2D, mine_t2D, group=cut.group)
    return whole_T2D.index_select(0, keys_K)


class _Again:
    """Saves only the shape and offset of views of the gathered tensors, and gathers them again for backward."""

    def __init__(self, key_tGD: Tensor, value_tGD: Tensor, keys_K: Tensor, cut: Cut | None, gathered: Tensor) -> None:
        self._mine = (key_tGD, value_tGD, keys_K, cut)
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
