"""Facts about a packed row that all layers need, computed once per micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megabatch.trainer.shared_tokens import Shared, keys_of
from megabatch.trainer.zigzag import Cut, on_device

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of every position of a row, [T, 1, D] each, for the D channels that are rotated."""


@dataclass
class Row(PackedSeqParams):
    """megatron-core's row description plus host-side facts, so layers neither read the device nor recompute them."""

    lengths: tuple[int, ...] = ()
    """Number of queries in each segment, in order; in each chunk of a segment if the row is split."""
    prefixes: tuple[int, ...] = ()
    """Number of keys that the last of these queries sees: the same, or more if the row is split or segments share
    tokens."""
    keys_K: Tensor | None = None
    """int64: which keys these are, of those that the ranks of `cut` have, rank by rank; None for the row's own."""
    rotation: Rotation | None = None
    """Rotates queries and keys; None leaves them unchanged."""
    cut: Cut | None = None
    """How the row is split over context-parallel ranks; None for a whole row."""
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Cache of attention masks, shared by all layers."""

    def mask(self, query: Tensor, key: Tensor, *, earlier: int) -> Tensor | None:
        """[queries, keys] in the queries' dtype, to add to scores: -inf at keys that a query does not see. None if a
        plain causal mask does: as many queries as keys, and no window.

        Args: `query`, `key` [..., length, D], where the last query's own key is the last key; `earlier`: how many keys
        before its own a query sees, -1 for all.
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
    shared: Shared | None = None,
) -> Row:
    """Args: bounds: int32 [S + 1] in host memory: the start of each segment of the whole row, then the row's end;
    shared: which tokens segments of a whole row share, where `cut` knows it of a part."""
    lengths = prefixes = tuple(stop - start for start, stop in pairwise(bounds.tolist()))
    keys_K = None
    if cut is not None:
        lengths, prefixes, keys_K = cut.lengths, cut.prefixes, cut.keys_K
    elif shared is not None:
        counts, keys = keys_of(bounds.numpy()[:-1].astype(np.int64), np.array(lengths), shared)
        prefixes, keys_K = tuple(counts.tolist()), on_device(torch.from_numpy(keys), device)
    queries = _bounds(lengths, device)
    values: dict[str, Any] = {"cu_seqlens_q": queries}
    values["cu_seqlens_kv"] = queries if prefixes is lengths else _bounds(prefixes, device)
    values |= {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(prefixes)}
    return Row(
        qkv_format="thd",
        **values,
        lengths=lengths,
        prefixes=prefixes,
        keys_K=keys_K,
        rotation=rotation,
        cut=cut,
    )


def _bounds(lengths: tuple[int, ...], device: torch.device | str) -> Tensor:
    return on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


class _Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, in one pass over each half; saves only the cosines and sines for backward."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(x_THD, cos_TD, sin_TD, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, sign=-1), None, None


def _turned(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, sign: int) -> Tensor:
    """Rotates by the angles; by their negatives for the gradient, since a rotation's transpose is its inverse."""
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
    """Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34): pairs channel i of D with channel i + D/2.

    Args: x_THD [T, H, D], any float dtype; rotation: see `rope.Rotary`. Returns: [T, H, D] of the same dtype.
    """
    return x_THD if rotation is None else _Rotated.apply(x_THD, *rotation)
