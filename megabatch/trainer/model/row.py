"""Facts about a packed row that all layers need, computed once per micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megabatch.trainer.zigzag import Cut, on_device

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of every position of a row, [T, 1, D] each; as many channels D as are rotated."""


@dataclass
class Row(PackedSeqParams):
    """megatron-core's description of a row, for our attention: layers neither read the device nor compute it again."""

    lengths: tuple[int, ...] = ()
    """Queries of each segment, in order; of each chunk of a segment where the row is cut."""
    prefixes: tuple[int, ...] = ()
    """Keys that the last of them sees: as many, or more where the row is cut."""
    rotation: Rotation | None = None
    """By which the attention turns queries and keys; None leaves them as they are."""
    cut: Cut | None = None
    """How the row is cut over context-parallel ranks; None for a row that is whole."""
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Masks that a layer of this row has made, for the others."""

    def mask(self, query: Tensor, key: Tensor, *, earlier: int) -> Tensor | None:
        """[queries, keys] to be added to scores, in the queries' type: -inf at keys that a query does not see; None
        where it sees all up to its own, and queries are as many as keys.

        Args: `query`, `key` [..., length, D], the last query's own key the last one; `earlier`: keys before its own
        that a query sees, -1 for all.
        """
        queries, keys = query.shape[-2], key.shape[-2]
        if queries == keys and (earlier < 0 or earlier >= keys - 1):
            return None
        if (queries, keys, earlier) not in self.masks:
            own = torch.arange(keys - queries, keys, device=query.device)[:, None]
            behind = own - torch.arange(keys, device=query.device)
            hidden = (behind < 0) | (behind > (keys if earlier < 0 else earlier))
            self.masks[queries, keys, earlier] = query.new_zeros(queries, keys).masked_fill_(hidden, -math.inf)
        return self.masks[queries, keys, earlier]


def row(
    bounds: Tensor,
    *,
    device: torch.device | str = "cpu",
    rotation: Rotation | None = None,
    cut: Cut | None = None,
) -> Row:
    """Args: bounds: int32 [S + 1] in host memory, where each segment of the whole row starts and the last one ends."""
    if cut is None:
        lengths = prefixes = tuple(stop - start for start, stop in pairwise(bounds.tolist()))
        queries = keys = bounds.to(device, non_blocking=True)
    else:
        lengths, prefixes = cut.lengths, cut.prefixes
        queries, keys = (_bounds(each, device) for each in (lengths, prefixes))
    values: dict[str, Any] = {"cu_seqlens_q": queries, "cu_seqlens_kv": keys}
    values |= {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(prefixes)}
    return Row(qkv_format="thd", **values, lengths=lengths, prefixes=prefixes, rotation=rotation, cut=cut)


def _bounds(lengths: tuple[int, ...], device: torch.device | str) -> Tensor:
    return on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


class _Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, in one pass over each half and with nothing saved but cosines and sines."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(x_THD, cos_TD, sin_TD, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, sign=-1), None, None


def _turned(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, sign: int) -> Tensor:
    """Rotated by the angles, or by their negatives: the gradient, as a rotation's transpose is its inverse."""
    width = cos_TD.shape[-1]
    half = width // 2
    out_THD = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    torch.mul(x_THD[..., :width], cos_TD, out=out_THD[..., :width])
    out_THD[..., :half].addcmul_(x_THD[..., half:width], sin_TD[..., :half], value=-sign)
    out_THD[..., half:width].addcmul_(x_THD[..., :half], sin_TD[..., half:], value=sign)
    if width < x_THD.shape[-1]:
        out_THD[..., width:] = x_THD[..., width:]
    return out_THD


def rotated(x_THD: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34): channel i of D turns with channel i + D/2.

    Args: x_THD [T, H, D], any float dtype; rotation: see `rope.Rotary`. Returns: [T, H, D] of the same dtype.
    """
    return x_THD if rotation is None else _Rotated.apply(x_THD, *rotation)
