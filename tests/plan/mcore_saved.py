"""Bytes that a real layer of the trainer's models leaves for the backward pass, and bytes that live at once in a pass
without gradients, on the CPU; printed as JSON.

A model of two layers keeps one layer more than a model of one. Storages that autograd saves are counted once, and
parameters are not. SwiGLU is megatron-core's, as on GPUs. PyTorch's RMS norm is one kernel on CUDA; on CPUs it is
spelled out in fp32, whose copies are left out of the count: everything else is bf16.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mcore_shards import adapt_groups
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabatch.config.recipe import Recipe
from megabatch.config.run import resolve
from megabatch.plan.shape import ModelShape
from megabatch.trainer import assemble, megatron_cpu
from megabatch.trainer.engine import Engine
from megabatch.trainer.model import transformer_config
from megabatch.trainer.model.row import row


def saved_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """In the recipe's type, and in fp32, of a forward pass over one row."""
    run = resolve(recipe, shape=shape, run_dir=Path("/nowhere"), provenance={})
    with assemble.join_ranks(run) as place:
        engine = assemble.build_engine(run, place, train_iters=10)
        for parameter in engine.model.chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return _saved(engine, length=recipe.data.max_length or 0)


def _saved(engine: Engine, *, length: int) -> dict[str, int]:
    chunk, hidden = engine.model.chunks[0], engine.model.config.hidden_size
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # alive to the end, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(engine, length=length)
    with torch.no_grad(), Live() as live:
        _forward(engine, length=length)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept}
    total = {"half": 0, "full": 0}
    for address, tensor in storages.items():
        if address in own:
            continue
        size = tensor.untyped_storage().nbytes()
        total["full" if tensor.dtype == torch.float32 else "half"] += size
        if tensor.dtype == torch.float32 and tensor.shape[-1] == hidden:
            # the CPU's rms_norm keeps two fp32 copies of its input, or one if its weight is frozen; a kernel the input
            total["half"] += size // (4 if engine.model.tuning.lora is None else 2)
    return total | {"passing": live.peak}


def _forward(engine: Engine, *, length: int) -> None:
    bounds = torch.tensor([0, length], dtype=torch.int32)
    assert engine.model.rotary is not None
    packed = row(bounds, rotation=engine.model.rotary(torch.arange(length)))
    engine.model.chunks[0](
        input_ids=torch.arange(length)[None] % 200,
        position_ids=torch.arange(length)[None],
        attention_mask=None,
        packed_seq_params=packed,
    )


class Live(TorchDispatchMode):
    """Bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((given, named))}
        result = operation(*given, **(named or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    megatron_cpu.adapt()
    transformer_config._takes_own_activation = lambda config: False  # megatron-core's SwiGLU, as on GPUs
    adapt_groups()
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    print(json.dumps([saved_bytes(recipe, shape) for recipe, shape in pickle.load(sys.stdin.buffer)]))
