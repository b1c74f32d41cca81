"""Frozen adapters and frozen models beside the trained one: what a task compares the policy with.

A reference may follow the policy from time to time (TR-DPO, arXiv:2404.09656): between two steps it becomes
alpha * policy + (1 - alpha) * reference.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.fit import check_digests, open_own
from megabatch.converters.family import Family
from megabatch.errors import ConfigError
from megabatch.trainer.adapter_sources import ReadAdapter
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.layers import TRAINED, adapted_layers
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
    is_copy: bool = False
    """An adapter on the trained one's layers, which changes nothing until it is made a copy of the trained one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """How a reference follows the policy; the source of the defaults is TRL's SyncRefModelCallback."""

    every: int
    """Optimizer steps between two blends."""
    alpha: float
    """The policy's part; 1 copies it."""

    def is_due(self, steps: int) -> bool:
        """Whether the reference is blended after so many steps of the run."""
        return steps > 0 and steps % self.every == 0


def add_adapter(model: Model, ranks: Ranks, family: Family, folder: Path, *, name: str) -> None:
    """Attaches a frozen adapter, with layers, ranks and scales of its own, and loads its numbers.

    It is in use inside `model.with_adapter(name)`; under the name `layers.TRAINED`, always.
    Args: folder: as in `PolicyWith.adapter`.
    Raises: ConversionError, CheckpointError for an adapter of another model, or one that cannot share this one.
    """
    assert name not in model.others, f"the model has an adapter {name!r} already"
    table = family.tensors(model.shape)
    opened = open_own(folder, Tables(family, model.shape), table)
    ranks.on_main(lambda: check_digests(opened.fitting))
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


def blend(reference: Model, policy: Model, alpha: float) -> None:
    """reference = alpha * policy + (1 - alpha) * reference, for every parameter and saved buffer of this rank's part,
    computed in fp32 and rounded to the reference's own type."""
    for mine, theirs in zip(reference.chunks, policy.chunks, strict=True):
        found, wanted = _tensors(mine), _tensors(theirs)
        assert found.keys() == wanted.keys(), "both are built from one shape and layout"
        for name, tensor in found.items():
            tensor.copy_(torch.lerp(tensor.float(), wanted[name].float(), alpha) if alpha < 1 else wanted[name])


def copy_adapter(model: Model, name: str) -> None:
    """Makes a frozen adapter (`PolicyWith.is_copy`) equal to the trained one."""
    with torch.no_grad():
        for layer in adapted_layers(model.chunks):
            trained = dict(layer.lora[TRAINED].named_parameters())
            for part, parameter in layer.lora[name].named_parameters():
                parameter.copy_(trained[part])


def _tensors(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """The numbers of a chunk's state, as they are in memory."""
    return {
        name: value
        for name, value in chunk.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _add_empty(model: Model, ranks: Ranks, *, name: str) -> None:
    """Attaches a frozen adapter that is like the trained one and changes nothing."""
    assert model.tuning.lora is not None
    lora = model.tuning.lora
    for chunk in model.chunks:
        lora.attach(chunk, model.config, ranks, padded_vocab=model.padded_vocab_size, name=name)
    for layer in adapted_layers(model.chunks):
        for parameter in layer.lora[name].parameters():
            parameter.requires_grad_(False).zero_()
    model.others[name] = lora


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
        if one.is_copy:
            _add_empty(policy, ranks, name=name)
        models[name], adapters[name] = policy, name if one.adapter is not None or one.is_copy else None
        with policy.with_adapter(adapters[name]):
            pass
    return models, adapters
