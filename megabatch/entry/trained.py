"""What a recipe trains, in the plan's names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megabatch.config.tuner import Tuner
from megabatch.converters.families import family_named
from megabatch.errors import ConversionError
from megabatch.plan.settings import Lora
from megabatch.plan.shape import ModelShape

_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""The plan's names that differ from the tables'."""


@lru_cache(maxsize=16)
def trained_of(tuner: Tuner, shape: ModelShape) -> Mapping[str, Any]:
    """The fields of the plan's settings that say what is trained; everything, if a name is not in the model."""
    if not tuner.trains_part:
        return {}
    try:
        return _lora(tuner, shape) if tuner.tuner_type == "lora" else {"frozen": _frozen(tuner, shape)}
    except ConversionError:
        return {}  # `tuning` reports it


def _lora(tuner: Tuner, shape: ModelShape) -> dict[str, Any]:
    from megabatch.converters.adapters.targets import find_targets, find_whole, module_of

    table = family_named(shape.model_type).tensors(shape)
    found = find_targets(
        table, tuner.target_modules, regex=tuner.target_regex, rank=tuner.lora_rank, fused=tuner.lora_fused
    )
    saved = find_whole(table, tuner.modules_to_save, biases=tuner.lora_bias == "all")
    targets = dict.fromkeys(_within_layer(module_of(target.weight)) for target in found)
    whole = dict.fromkeys(_within_layer(name.rpartition(".")[0]) for name in saved)
    return {
        "lora": Lora(
            rank=tuner.lora_rank,
            targets=tuple(targets),
            fused=tuner.lora_fused,
            dropout=tuner.lora_dropout,
            saved=tuple(whole),
        )
    }


def _frozen(tuner: Tuner, shape: ModelShape) -> frozenset[str]:
    from megabatch.converters.frozen import Freezing, frozen_names

    names = frozen_names(family_named(shape.model_type).tensors(shape), Freezing.of(tuner))
    return frozenset(_planned(name) for name in names)


def _planned(name: str) -> str:
    found = next((ours for ours in _NORMS if name.endswith(ours)), None)
    return name if found is None else name.removesuffix(found) + _NORMS[found]


def _within_layer(module: str) -> str:
    """`self_attention.linear_qkv` of `decoder.layers.3.self_attention.linear_qkv`."""
    return module.split(".", 3)[3] if module.startswith("decoder.layers.") else module
