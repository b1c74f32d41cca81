"""Output of some positions only: a prediction without weight costs a product with the whole vocabulary for nothing,
and so do the last layer's steps after its attention, where each position is computed alone.

T: positions of the row on this rank, t: those that are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megabatch.trainer.model.naming import unwrap


def can_leave_out_rows(config: TransformerConfig, chunk: nn.Module) -> bool:
    """Whether a chunk has the output layer, and each of its ranks sees every position there: with sequence parallelism
    the layer itself gathers them."""
    return bool(unwrap(chunk).post_process) and not config.sequence_parallel


@contextmanager
def rows_of_output(chunk: nn.Module, rows_t: Tensor | None) -> Iterator[None]:
    """Inside this context the chunk's output is [1, t, V], of these positions; None for all T."""
    if rows_t is None:
        yield
        return

    def chosen_before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_T1H, *others = inputs
        return hidden_T1H.index_select(0, rows_t), *others

    def chosen_after(_: nn.Module, inputs: tuple[Any, ...], hidden_T1H: Tensor) -> Tensor:
        return hidden_T1H.index_select(0, rows_t)

    model = unwrap(chunk)
    if (between := _between_attention_and_mlp(model)) is None:
        hook = model.output_layer.register_forward_pre_hook(chosen_before)
    else:
        hook = between.register_forward_hook(chosen_after)
    try:
        yield
    finally:
        hook.remove()


def _between_attention_and_mlp(model: nn.Module) -> nn.Module | None:
    """The module of the last layer that its hidden states [T, 1, H] go through between attention and MLP; None where
    a later step needs every position or their number: experts, dropout, recomputation of whole layers, MTP layers, and
    FP8, whose products take multiples of 16 rows."""
    config, layers = model.config, model.decoder.layers
    if not len(layers) or config.hidden_dropout or config.recompute_granularity == "full":
        return None
    if config.mtp_num_layers or config.fp8 or config.fp4:
        return None
    layer = layers[-1]
    if not isinstance(layer, TransformerLayer) or not isinstance(layer.mlp, MLP):
        return None
    between = layer.pre_cross_attn_layernorm, layer.cross_attention, layer.cross_attn_bda
    passes_on = all(isinstance(module, IdentityOp | IdentityFuncOp) for module in between)
    return between[0] if passes_on else None
