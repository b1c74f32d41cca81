"""Core attention on flat rows of several sequences, on any device, without Transformer Engine.

Shapes: T tokens of the flat row, H query heads, G key/value heads, D channels of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def _flash() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention; it takes a causal window from torch 2.11 on."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


class PackedAttention(MegatronModule):
    """Causal attention in which the sequences of a row never see each other.

    softmax(Q K^T / sqrt(D)) V for each sequence, grouped queries included, softmax in fp32 inside the kernel. CUDA in
    half precision takes torch's variable-length flash kernel, everything else scaled_dot_product_attention for each
    sequence. Takes megatron-core's place of `core_attention`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.dropout = config.attention_dropout
        self.flash = _flash()

    def forward(
        self,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """[T, H, D], [T, G, D], [T, G, D] → [T, H * D]; sequence bounds from `packed_seq_params.cu_seqlens_q`."""
        assert packed_seq_params is not None, "rows are always packed"
        bounds: Tensor = packed_seq_params.cu_seqlens_q
        if self.flash is not None and self._fits_flash(query_THD):
            longest = int(packed_seq_params.max_seqlen_q)
            repeat = query_THD.shape[1] // key_TGD.shape[1]
            out = self.flash(
                query_THD,
                key_TGD.repeat_interleave(repeat, dim=1),
                value_TGD.repeat_interleave(repeat, dim=1),
                bounds,
                bounds,
                longest,
                longest,
                scale=self.scale,
                window_size=(-1, 0),
            )
        else:
            on_host = (
                bounds if packed_seq_params.cu_seqlens_q_padded is None else packed_seq_params.cu_seqlens_q_padded
            )
            out = self._each_sequence(query_THD, key_TGD, value_TGD, on_host.tolist())
        return out.reshape(out.shape[0], -1)

    def _fits_flash(self, query_THD: Tensor) -> bool:
        half = query_THD.dtype in (torch.bfloat16, torch.float16)
        return query_THD.is_cuda and half and not (self.training and self.dropout)

    def _each_sequence(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, bounds: list[int]) -> Tensor:
        lengths = [stop - start for start, stop in pairwise(bounds)]
        # splitting once rather than slicing: the gradient of a slice is a zero-filled tensor of the whole row
        split = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query_THD, key_TGD, value_TGD))
        parts = []
        for query, key, value in zip(*split, strict=True):
            out = scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
                dropout_p=self.dropout if self.training else 0.0,
            )
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts)
