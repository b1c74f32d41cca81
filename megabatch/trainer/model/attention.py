"""Core attention on flat rows of several sequences, on any device, without Transformer Engine.

Shapes: T tokens of the flat row on this rank, H query heads, G key/value heads, D channels per head, K keys: T or,
where the row is split over ranks or its sequences share tokens, all that the queries see, segment by segment.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megabatch.config.resolved import resolved
from megabatch.trainer.model.keys import seen
from megabatch.trainer.model.row import Row, rotated

_WIDEST_FLASH = 256
"""Channels of a head; the kernel takes multiples of 8 up to this."""


def _flash() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention if it supports a causal window (torch 2.11 or later), else None.

    None on CPUs too, which it does not run on: its module imports torch's compiler.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def takes_groups(flash: Callable[..., Tensor] | None) -> bool:
    """Whether the kernel supports grouped-query attention without repeated keys; torch's does from 2.13 on."""
    return flash is not None and "enable_gqa" in inspect.signature(flash).parameters


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a row; sequences do not attend to each other.

    softmax(Q K^T / sqrt(D)) V for each sequence, with grouped queries and an fp32 softmax inside the kernel, after the
    row's rotation of queries and keys. Half precision on CUDA uses torch's variable-length flash kernel. Everything
    else uses scaled_dot_product_attention, once per sequence, or once for all if they are equally long. Replaces
    megatron-core's `core_attention`.

    If the row is split over context-parallel ranks, each chunk of a sequence attends to the sequence up to the chunk's
    end; if sequences share tokens, each attends to those before its own (`shared_tokens`). The kernels see a sequence
    with fewer queries than keys, aligned at the last query and key.
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
        self.scale = softmax_scale or 1.0 / math.sqrt(resolved(config.kv_channels))
        self.dropout = config.attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.earlier = config.window_size[0] if windowed else -1
        """How many keys before its own a query sees; -1 for all."""
        self.flash = _flash()
        self.flash_takes_groups = takes_groups(self.flash)

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
        """[T, H, D], [T, G, D], [T, G, D], before rotation → [T, H * D]; `packed_seq_params` is a `Row`."""
        row = packed_seq_params
        assert isinstance(row, Row), "rows are always packed"
        query_THD, key_TGD = (rotated(x, row.rotation) for x in (query_THD, key_TGD))
        with self._generator(), seen(key_TGD, value_TGD, row.keys_K, row.cut) as (key_KGD, value_KGD):
            if self.flash is not None and self._fits_flash(query_THD):
                out = self._varlen(query_THD, key_KGD, value_KGD, row)
            elif len(set(zip(row.lengths, row.prefixes, strict=True))) == 1:
                out = self._rectangle(query_THD, key_KGD, value_KGD, row)
            else:
                out = self._each_sequence(query_THD, key_KGD, value_KGD, row)
        return out.reshape(out.shape[0], -1)

    def _generator(self) -> AbstractContextManager[None]:
        """The random generator for dropout: each tensor-parallel rank has its own heads, so its own generator.

        With sequence parallelism, megatron-core already sets it for the whole block and restores it to recompute.
        """
        if not (self.training and self.dropout) or self.config.sequence_parallel:
            return nullcontext()
        return cast(AbstractContextManager[None], get_cuda_rng_tracker().fork())

    def _varlen(self, query_THD: Tensor, key_KGD: Tensor, value_KGD: Tensor, row: Row) -> Tensor:
        assert self.flash is not None
        groups = query_THD.shape[1] // key_KGD.shape[1]
        options: dict[str, Any] = {"scale": self.scale, "window_size": (self.earlier, 0)}
        if groups > 1 and self.flash_takes_groups:
            options["enable_gqa"] = True
        elif groups > 1:
            key_KGD, value_KGD = (x.repeat_interleave(groups, dim=1) for x in (key_KGD, value_KGD))
        bounds = row.cu_seqlens_q, row.cu_seqlens_kv, int(row.max_seqlen_q), int(row.max_seqlen_kv)
        return self.flash(query_THD, key_KGD, value_KGD, *bounds, **options)

    def _fits_flash(self, query_THD: Tensor) -> bool:
        half, width = query_THD.dtype in (torch.bfloat16, torch.float16), query_THD.shape[-1]
        fits = half and width % 8 == 0 and width <= _WIDEST_FLASH
        return query_THD.is_cuda and fits and not (self.training and self.dropout)

    def _rectangle(self, query_THD: Tensor, key_KGD: Tensor, value_KGD: Tensor, row: Row) -> Tensor:
        """Computes all sequences at once; they must be equally long."""
        query, key, value = (
            x.view(len(row.lengths), -1, *x.shape[1:]).transpose(1, 2) for x in (query_THD, key_KGD, value_KGD)
        )
        return self._causal(query, key, value, row).transpose(1, 2).flatten(0, 1)

    def _each_sequence(self, query_THD: Tensor, key_KGD: Tensor, value_KGD: Tensor, row: Row) -> Tensor:
        # one split instead of slices: the gradient of each slice would be a zero-filled tensor of the whole row
        tensors = ((query_THD, row.lengths), (key_KGD, row.prefixes), (value_KGD, row.prefixes))
        split = (x.transpose(0, 1)[None].split(list(lengths), dim=2) for x, lengths in tensors)
        parts = [self._causal(query, key, value, row) for query, key, value in zip(*split, strict=True)]
        return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts])

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, row: Row) -> Tensor:
        """Args: [sequences, heads, length, D] each; the last query's own key is the last key."""
        mask = row.mask(query, key, earlier=self.earlier)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            dropout_p=self.dropout if self.training else 0.0,
        )
