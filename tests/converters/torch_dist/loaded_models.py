"""Loads checkpoints into megatron-core's models on the CPU; run as a program, since that changes the process for good.

    python loaded_models.py HF_FOLDER STACKED PER_LAYER

STACKED goes into a model with `moe_layer_freq` 1, PER_LAYER into one with a list of ones. Prints what the second asks
a checkpoint for, one key a line; fails unless both get equal weights, and the second cannot load STACKED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megabatch.config.model import Model
from megabatch.config.recipe import Recipe
from megabatch.config.run import derived
from megabatch.converters.hf_model import open_hf_model
from megabatch.trainer import megatron_cpu
from megabatch.trainer.model.build import build, ddp_config
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.ranks import Ranks


def built(folder: Path, ranks: Ranks, *, listed: bool) -> Any:
    """megatron-core's model, its weights not a number until they are loaded."""
    shape = open_hf_model(folder).shape
    recipe = Recipe(name="loaded", task="sft", model=Model(model=str(folder), torch_dtype="float32"))
    config = transformer_config(derived(recipe, shape=shape, run_dir=Path()), shape, virtual_size=None)
    if listed:
        config.moe_layer_freq = [1] * shape.num_layers
    plain = ddp_config(use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
    model = build(shape, config, ranks, plain).chunks[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def load(model: Any, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Strictly; the parameters by name."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(loaded["model"], strict=True)
    return dict(model.named_parameters())


def keys(state: Any) -> set[str]:
    """Of tensors, and of the objects beside them, that a sharded state dict asks for."""
    if isinstance(state, dict):
        return set().union(*map(keys, state.values()))
    state = state.build() if hasattr(state, "build") else state
    return keys(dict(enumerate(state))) if isinstance(state, list) else {getattr(state, "unique_key", state.key)}


def main(folder: Path, stacked: Path, per_layer: Path) -> None:
    megatron_cpu.adapt()
    with Ranks(gpus_per_node=0) as ranks:
        expected = load(built(folder, ranks, listed=False), stacked)
        found = load(built(folder, ranks, listed=True), per_layer)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), name
        refused = built(folder, ranks, listed=True)
        try:
            load(refused, stacked)
        except CheckpointException:
            print("\n".join(sorted(keys(refused.sharded_state_dict()))))
        else:
            raise AssertionError("a model with moe_layer_freq as a list loads stacked layers")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
