"""What of a model is trained: all of it, all but what is frozen, or adapters beside it.

We apply it to a chunk before data parallelism wraps it, so gradient buffers and optimizer hold only what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megabatch.config.tuner import Tuner
from megabatch.converters.adapters.targets import find_whole
from megabatch.converters.frozen import Freezing, frozen_names
from megabatch.converters.mapping import Mapped, elements
from megabatch.errors import ConfigError, ConversionError
from megabatch.trainer.model.lora.lora import Lora, lora_of
from megabatch.trainer.model.naming import named_parameters
from megabatch.trainer.ranks import Ranks

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Tuning:
    """Which tensors of a model are frozen, and its adapters."""

    table: Sequence[Mapped] = ()
    """The model's own tensors; empty if the run trains all of them and no adapter."""
    frozen: frozenset[str] = frozenset()
    """Canonical names of the frozen tensors."""
    lora: Lora | None = None

    @cached_property
    def trained(self) -> frozenset[str]:
        """Canonical names of the model's own trained tensors; with LoRA those of `modules_to_save`."""
        return frozenset(mapped.name for mapped in self.table) - self.frozen

    def apply(self, chunk: Any, config: TransformerConfig, ranks: Ranks, *, padded_vocab: int) -> None:
        """Makes a bare chunk ready to train."""
        if self.lora is not None:
            self.lora.attach(chunk, config, ranks, padded_vocab=padded_vocab)
        if not self.frozen:
            return
        tied = chunk.share_embeddings_and_output_weights
        for name, _, parameter in named_parameters([chunk], first_expert=0):
            if (_EMBEDDING if tied and name == _OUTPUT else name) in self.frozen:
                parameter.requires_grad_(False)
        for layer in chunk.modules():
            _keep_gradient_of_bias(layer)
        if chunk.pre_process and _may_lose_gradients(config):
            chunk.embedding.register_forward_hook(_with_gradient)
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(_with_plain_gradient)

    def parameters(self) -> tuple[int, int]:
        """(number of trained parameters, number of all parameters), adapters included."""
        adapters = self.lora.table if self.lora is not None else ()
        added = sum(elements(mapped.shape) for mapped in adapters)
        trained = sum(elements(mapped.shape) for mapped in self.table if mapped.name in self.trained)
        return trained + added, sum(elements(mapped.shape) for mapped in self.table) + added


ALL = Tuning()
"""All of the model is trained."""


def tuning_of(tuner: Tuner, table: Sequence[Mapped]) -> Tuning:
    """What a recipe trains. Raises: ConfigError for names that match nothing."""
    lora = lora_of(tuner, table)
    try:
        if lora is None:
            frozen = frozen_names(table, Freezing.of(tuner))
            return Tuning(table, frozen) if frozen else ALL
        whole = find_whole(table, tuner.modules_to_save, biases=tuner.lora_bias == "all")
    except ConversionError as e:
        raise ConfigError(f"tuner.{e}") from e
    if both := [target.weight.name for target in lora.targets if target.weight.name in whole]:
        raise ConfigError(
            f"tuner.modules_to_save: {both[0]} is trained in full, and target_modules gives it an adapter"
        )
    return Tuning(table, frozenset(mapped.name for mapped in table) - whole, lora)


def _keep_gradient_of_bias(layer: Any) -> None:
    """Adds a trained bias outside megatron-core's linear layer: with a frozen weight, the layer (0.16-0.19) gives its
    bias no gradient."""
    if not isinstance(layer, ColumnParallelLinear) or layer.bias is None or layer.skip_bias_add:
        return
    if layer.bias.requires_grad and not layer.weight.requires_grad:
        layer._forward_impl = partial(_with_bias, layer._forward_impl)


def _with_bias(forward: Callable[..., Tensor], *, bias: Tensor, **given: Any) -> Tensor:
    return forward(bias=None, **given) + bias


def _may_lose_gradients(config: TransformerConfig) -> bool:
    """Whether gradients get lost unless the embedding's output requires one: recomputed layers compute gradients only
    if their inputs require them, and pipeline schedules expect every stage's output to require one."""
    recomputes = config.recompute_granularity == "full" or {*(config.recompute_modules or ())} - {"core_attn"}
    return bool(recomputes) or config.pipeline_model_parallel_size > 1


def _with_plain_gradient(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
    """Normalises the strides of the logits' gradient, which has an odd one in its dimension of size 1. With a frozen
    weight, torch (2.13) would otherwise compute the product row by row, many times slower."""
    if output[0].requires_grad:
        output[0].register_hook(lambda grad: grad.reshape(-1, grad.shape[-1]).view(grad.shape))


def _with_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()
