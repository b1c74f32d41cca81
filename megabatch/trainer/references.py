"""Frozen adapters and frozen models beside the trained one: what a task compares the policy with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.fit import open_own
from megabatch.converters.family import Family
from megabatch.errors import ConfigError
from megabatch.trainer.adapter_sources import ReadAdapter
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.layers import adapted_layers
from megabatch.trainer.model.lora.lora import Lora
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import load, prove_complete

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PolicyWith:
    """The policy with another adapter in place of the trained one, or with none: a model without weights of its own.

    `Parts.frozen` takes it in place of a model.
    """

    adapter: Path | None = None
    """A folder of PEFT's or in megatron-core's format, a run or a checkpoint; None: no adapter."""


def add_adapter(model: Model, ranks: Ranks, family: Family, folder: Path, *, name: str) -> None:
    """Attaches a frozen adapter, with layers, ranks and scales of its own, and loads its numbers.

    It is in use inside `model.with_adapter(name)`; under the name `layers.TRAINED`, always.
    Args: folder: as in `PolicyWith.adapter`.
    Raises: ConversionError, CheckpointError for an adapter of another model, or one that cannot share this one.
    """
    assert name not in model.others, f"the model has an adapter {name!r} already"
    table = family.tensors(model.shape)
    opened = open_own(folder, Tables(family, model.shape), table)
    lora = Lora(opened.targets, scale=1.0, scales=opened.scales)
    for chunk in model.chunks:
        lora.attach(chunk, model.config, ranks, padded_vocab=model.padded_vocab_size, name=name)
    for layer in adapted_layers(model.chunks):
        if name in layer.lora:
            layer.lora[name].requires_grad_(False)
    prove_complete(model, lora.table, ranks, adapter=name)
    made = ReadAdapter(opened.fitting)
    load(model, made, lora.table, ranks, dtype_of=made.dtypes, adapter=name)
    model.others[name] = lora
    logger.info("%s is the adapter in %s", name, folder)


def with_policy(
    frozen: Mapping[str, Model | PolicyWith], policy: Model, ranks: Ranks, family: Family
) -> tuple[dict[str, Model], dict[str, str | None]]:
    """Every model by name, and the adapter that those of the policy's use.

    Raises: ConfigError for another adapter of a policy whose own parameters are trained.
    """
    models: dict[str, Model] = {}
    adapters: dict[str, str | None] = {}
    for name, one in frozen.items():
        if isinstance(one, Model):
            models[name] = one
            continue
        if policy.tuning.lora is None:
            raise ConfigError(f"the model {name!r} is the policy without its adapter, and tuner_type is 'full'")
        if one.adapter is not None:
            add_adapter(policy, ranks, family, one.adapter, name=name)
        models[name], adapters[name] = policy, None if one.adapter is None else name
        with policy.with_adapter(adapters[name]):
            pass
    return models, adapters
