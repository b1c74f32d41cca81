"""Keys and values while tokens are drawn one at a time: kept with room to grow, and read once by all heads of a group.

transformers copies all of them for every token, to append one and to repeat each for the query heads that share it.
B: rows, H: query heads, G: key heads, R = H / G, T: tokens so far, D: width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOM = 64
"""Tokens that fit before memory for more is allocated."""
_NAME = "megabatch_grouped"


class Growing(DynamicLayer):
    """One layer's keys and values [B, G, T, D]: the first T of a block with room behind them."""

    keys: Tensor
    values: Tensor
    _blocks: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used, new = self.get_seq_length(), key_states.shape[-2]
        if self._blocks is None or self._blocks[0].shape[-2] < used + new:
            self._blocks = self._grown(self.keys, key_states, used), self._grown(self.values, value_states, used)
        for block, states in zip(self._blocks, (key_states, value_states), strict=True):
            block[:, :, used : used + new] = states
        self.keys, self.values = (block[:, :, : used + new] for block in self._blocks)
        return self.keys, self.values

    @staticmethod
    def _grown(old: Tensor, states: Tensor, used: int) -> Tensor:
        batch, heads, new, width = states.shape
        block = states.new_empty(batch, heads, used + new + ROOM, width)
        if used:
            block[:, :, :used] = old
        return block

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._blocks = None


def growing_cache(config: Any) -> DynamicCache:
    """A cache for a model of this config; layers with a window keep transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def share_keys(model: Any) -> None:
    """Lets a model that would use torch's attention read each key once for all query heads of its group."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """The heads of a group are as many queries at the same place: softmax(q k) v for each of them, [B, 1, H, D]."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    if queries != 1 or heads == groups or more.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return found
    query_BGRD = query.view(batch, groups, heads // groups, -1)
    out_BGRD = scaled_dot_product_attention(
        query_BGRD, key, value, attn_mask=attention_mask, scale=more.get("scaling")
    )
    return out_BGRD.reshape(batch, 1, heads, -1), None
