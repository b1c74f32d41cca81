"""Output of some positions only: a prediction without weight costs a product with the whole vocabulary for nothing.

T: positions of the row on this rank, t: those that are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
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

    def chosen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_T1H, *others = inputs
        return hidden_T1H.index_select(0, rows_t), *others

    hook = unwrap(chunk).output_layer.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()
