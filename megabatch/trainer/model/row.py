"""What all layers need to know of a packed row, found once for each micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of every position of a row, [T, 1, D] each; as many channels D as are rotated."""


@dataclass
class Row(PackedSeqParams):
    """megatron-core's description of a row, for our attention: layers neither read the device nor compute it again."""

    lengths: tuple[int, ...] = ()
    """Tokens of each segment, in order."""
    rotation: Rotation | None = None
    """By which the attention turns queries and keys; None leaves them as they are."""


def row(bounds: Tensor, *, device: torch.device | str = "cpu", rotation: Rotation | None = None) -> Row:
    """Args: bounds: int32 [S + 1] in host memory, where each segment starts and the last one ends."""
    lengths = tuple(stop - start for start, stop in pairwise(bounds.tolist()))
    bounds = bounds.to(device, non_blocking=True)
    longest = max(lengths)
    values: dict[str, Any] = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
    values |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    return Row(qkv_format="thd", **values, lengths=lengths, rotation=rotation)


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
