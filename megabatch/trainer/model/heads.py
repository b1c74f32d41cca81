"""Heads in place of the output layer: a score for each label, or the hidden states themselves.

T: tokens of the row. t: those on this rank, T / tp with sequence parallelism. H: hidden size. L: labels.
A head sees every token of the row, and a readout picks those that count: a score costs a token H·L multiplications,
far less than a layer, and the row stays together whatever splits it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Head(nn.Module):
    """Has the interface of megatron-core's output layer; its weights are the same on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, labels: int, *, bias: bool = False) -> None:
        """Args: labels: 0 for the hidden states."""
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = _replicated(config, labels, config.hidden_size) if labels else None
        self.bias = _replicated(config, labels) if bias else None

    def forward(
        self, hidden_t1H: Tensor, weight: None = None, runtime_gather_output: None = None
    ) -> tuple[Tensor, None]:
        """[t, 1, H] → [T, 1, L], or [T, 1, H]; whole on every tensor-parallel rank."""
        output = hidden_t1H if self.weight is None else nn.functional.linear(hidden_t1H, self.weight, self.bias)
        if self.sequence_parallel:
            # every rank computes the same loss from it, so each takes its own tokens' part of the gradient
            output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
        return output, None


def _replicated(config: TransformerConfig, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
    # with sequence parallelism each rank has the gradient of its tokens; megatron-core sums such weights
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class HeadedModel(GPTModel):
    """A GPTModel with a head. megatron-core's checkpoints assume an output layer with a padded vocabulary."""

    post_process: bool

    def set_head(self, labels: int, *, bias: bool) -> None:
        if self.post_process:
            self.output_layer = Head(self.config, labels, bias=bias)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Without the special treatment of an output layer; the head is an ordinary replicated tensor."""
        post_process, self.post_process = self.post_process, False
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = post_process
