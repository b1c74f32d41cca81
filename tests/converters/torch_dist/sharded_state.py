"""What megatron-core's ranks ask a checkpoint for, written out by hand from its layout; run as a program, it saves.

Saving needs megatron-core adapted to the CPU, which changes the process for good: hence a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.mapping import Mapped
from megabatch.converters.shards import read_shard, shard_shape

PADDED_VOCAB = 64
NOT_STACKED = ("qwen3-moe-mixed",)
State = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def sharded_state(folder: Path, *, tp: int, stacked: bool) -> tuple[State, Tensors]:
    """What the ranks of a tensor-parallel group ask for, all in one process, and what they must get."""
    model = open_hf_model(folder)
    state: State = {}
    expected: Tensors = {}
    for mapped in model.tensors:
        key, offsets = _key_and_offsets(model, mapped, stacked)
        for rank in range(1 if mapped.split == "replicated" else tp):
            local = f"{mapped.name}|{mapped.expert}|{rank}"
            state[local], expected[local] = _shard(model, mapped, key, offsets, rank=rank, tp=tp)
        module, _, kind = mapped.name.rpartition(".")
        if mapped.layer is not None and kind == "weight" and "linear_" in module.rpartition(".")[2]:
            state[f"extra|{mapped.name}|{mapped.expert}"] = _extra_state(key, offsets)
    return state, expected


def _key_and_offsets(model: HfModel, mapped: Mapped, stacked: bool) -> tuple[str, list[tuple[int, int, int]]]:
    key, offsets = mapped.name, []
    if stacked and mapped.layer is not None:
        key = key.replace(f"layers.{mapped.layer}.", "layers.")
        offsets.append((0, mapped.layer, model.shape.num_layers))
    if mapped.expert is not None:
        key = key.replace("mlp.experts.", "mlp.experts.experts.")
        offsets.append((len(offsets), mapped.expert, model.shape.num_experts or 0))
    return key, offsets


def _extra_state(key: str, offsets: list[tuple[int, int, int]]) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    at, of = tuple(x[1] for x in offsets) or (0,), tuple(x[2] for x in offsets) or (1,)
    return ShardedObject(key.removesuffix("weight") + "_extra_state", None, of, at)


def _shard(
    model: HfModel, mapped: Mapped, key: str, offsets: list[tuple[int, int, int]], *, rank: int, tp: int
) -> tuple[Any, torch.Tensor]:
    from megatron.core.dist_checkpointing import ShardedTensor

    padded = PADDED_VOCAB if mapped.split == "vocab" else None
    data = read_shard(model.folder, mapped, tp_rank=rank, tp_size=tp, padded_vocab=padded)
    wanted = torch.frombuffer(data, dtype=torch.float32).view(shard_shape(mapped, tp_size=tp, padded_vocab=padded))
    blank = torch.full_like(wanted, 0.0 if padded else 7.0)
    axes = len(offsets)
    if len(mapped.sections) == 1:
        axis = {"column": 0, "vocab": 0, "row": 1}.get(mapped.split)
        cut = [] if axis is None else [(axes + axis, rank, tp)]
        return ShardedTensor.from_rank_offsets(
            key, blank, *offsets, *cut, prepend_axis_num=axes, allow_shape_mismatch=padded is not None
        ), wanted
    # gate and up are two tensors of one key, as megatron-core's gated linear layer makes them
    return [
        ShardedTensor.from_rank_offsets(key, half, *offsets, (axes, part * tp + rank, 2 * tp), prepend_axis_num=axes)
        for part, half in enumerate(blank.chunk(2))
    ], wanted


def save(folder: Path, output: Path, *, tp: int, stacked: bool) -> None:
    """Saves a model as megatron-core does when `tp` ranks hold it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    state, expected = sharded_state(folder, tp=tp, stacked=stacked)
    for local, tensor in expected.items():
        parts = state[local] if isinstance(state[local], list) else [state[local]]
        for part, values in zip(parts, tensor.chunk(len(parts)), strict=True):
            part.data = values.contiguous()
    output.mkdir(parents=True)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(output), sharded_strategy=strategy)


def model_of(folder: Path, checkpoint: Path, output: Path) -> None:
    """Loads a checkpoint strictly into megatron-core's real model, compares every parameter, and saves it again."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from megabatch.config.model import Model as ModelConfig
    from megabatch.config.recipe import Recipe
    from megabatch.config.run import derived
    from megabatch.trainer import weights
    from megabatch.trainer.model.build import build, ddp_config
    from megabatch.trainer.model.transformer_config import transformer_config
    from megabatch.trainer.ranks import Ranks

    opened = open_hf_model(folder)
    given = Recipe(name="test", task="sft", model=ModelConfig(model=str(folder), torch_dtype="float32"))
    recipe = derived(given, shape=opened.shape, run_dir=Path())
    with Ranks() as ranks:
        ddp = ddp_config(use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
        model = build(opened.shape, transformer_config(recipe, opened.shape, virtual_size=None), ranks, ddp)
        inner = model.chunks[0]
        # nested, because megatron-core puts the common state beside what was asked for
        asked = {"model": inner.sharded_state_dict()}
        loaded = dist_checkpointing.load(asked, str(checkpoint), strict="raise_all")
        inner.load_state_dict(loaded["model"], strict=True)
        got = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
        dtypes = {name: info.dtype for name, info in opened.folder.tensors.items()}
        weights.load(model, opened.folder, opened.tensors, ranks, dtype_of=dtypes)
        for name, parameter in inner.named_parameters():
            assert torch.equal(parameter, got[name]), name
        output.mkdir(parents=True)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(inner.sharded_state_dict(), str(output), sharded_strategy=strategy)


def main(jobs: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from in_process_writer import use_in_process_writer

    from megabatch.trainer.megatron_cpu import adapt

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    adapt()
    use_in_process_writer()
    for job in jobs["save"]:
        save(Path(job["folder"]), Path(job["output"]), tp=job["tp"], stacked=job["stacked"])
    for job in jobs["model"]:
        model_of(Path(job["folder"]), Path(job["checkpoint"]), Path(job["output"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
