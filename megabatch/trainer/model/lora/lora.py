"""LoRA of one run: which layers of its model have adapters, and how they are hung below the layers of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megabatch.config.tuner import Tuner
from megabatch.converters.adapters.config import scale_of
from megabatch.converters.adapters.targets import Target, find_targets, table_of
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConfigError, ConversionError
from megabatch.trainer.model.lora.adapter import Embedding, Place
from megabatch.trainer.model.lora.layers import TRAINED, adapter_type, add_adapter
from megabatch.trainer.model.naming import named_layers, weight_names
from megabatch.trainer.ranks import Ranks


@dataclass(frozen=True)
class Lora:
    """The adapters that a model has."""

    targets: tuple[Target, ...]
    scale: float
    """What B A x is multiplied by."""
    dropout: float = 0.0
    scales: tuple[float, ...] = ()
    """In place of `scale`, one for each target, for an adapter that was trained elsewhere."""

    @cached_property
    def table(self) -> list[Mapped]:
        """The adapters' tensors, with their names in PEFT's folder."""
        return table_of(self.targets)

    def attach(
        self, chunk: nn.Module, config: TransformerConfig, ranks: Ranks, *, padded_vocab: int, name: str = TRAINED
    ) -> None:
        """Attaches an adapter of this name to each target of a bare chunk; does not initialise its weights."""
        scales = self.scales or [self.scale] * len(self.targets)
        keys = [(target.weight.name, target.weight.expert) for target in self.targets]
        by_weight = dict(zip(keys, zip(self.targets, scales, strict=True), strict=True))
        experts = (config.num_moe_experts or 0) // ranks.ep_size
        for weight, expert, layer in named_layers(chunk, first_expert=ranks.ep_rank * experts):
            if (weight, expert) not in by_weight:
                continue
            target, scale = by_weight[weight, expert]
            kind = adapter_type(layer)
            place = _place(layer, config, ranks, is_expert=expert is not None, padded_vocab=padded_vocab)
            dropout = 0.0 if kind is Embedding else self.dropout
            like = getattr(layer, weight_names(layer)[0])
            adapter = kind(target, like, place, scale=scale, dropout=dropout)
            add_adapter(layer, name, adapter)


def lora_of(tuner: Tuner, table: Sequence[Mapped]) -> Lora | None:
    """The recipe's adapters, or None for full training. Raises: ConfigError for names that match no layer."""
    if tuner.tuner_type != "lora":
        return None
    try:
        targets = find_targets(
            table, tuner.target_modules, regex=tuner.target_regex, rank=tuner.lora_rank, fused=tuner.lora_fused
        )
    except ConversionError as e:
        raise ConfigError(f"tuner: {e}") from e
    scale = scale_of(tuner.lora_alpha, tuner.lora_rank, use_rslora=tuner.use_rslora)
    return Lora(tuple(targets), scale, tuner.lora_dropout)


def _place(layer: Any, config: TransformerConfig, ranks: Ranks, *, is_expert: bool, padded_vocab: int) -> Place:
    # the embedding has its own setting for scattering its output over sequence parallelism
    scatters = getattr(layer, "reduce_scatter_embeddings", config.sequence_parallel)
    return Place(
        group=ranks.state.get_expert_tensor_parallel_group() if is_expert else ranks.tp,
        sequence_parallel=bool(scatters) and not is_expert,
        is_expert=is_expert,
        padded_vocab=padded_vocab,
    )
