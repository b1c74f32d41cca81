"""Real megatron-core models, buffers and optimizers without memory: what one rank of a layout allocates.

Run as a program: recipes as pickles on standard input, sizes as JSON on standard output. The world is torch's fake
process group, so that this one process is any rank of a thousand; tensors are on the meta device. Models, data
parallelism and optimizers are made by the trainer's own functions.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megabatch.config.recipe import Recipe
from megabatch.config.run import RunConfig, resolve
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.trainer import assemble, matrices, megatron_cpu, ranks
from megabatch.trainer.engine import Engine


def adapt() -> None:
    """megatron-core's adaptation to CPUs, with the meta device for the CPU, and without groups over real sockets."""
    megatron_cpu.adapt()
    adapt_groups()
    from megatron.core.tensor_parallel import layers

    layers.torch.cuda.current_device = lambda: torch.device("meta")
    spelled = torch.Tensor.type
    torch.Tensor.type = lambda tensor, *to: spelled(tensor, *to) if to else spelled(tensor).replace("cuda.meta.", "")
    dist.all_gather_object = lambda found, own, group=None: found.__setitem__(slice(None), [own] * len(found))
    torch.set_default_device("meta")
    ranks.adapt = lambda: None  # it is done


def adapt_groups() -> None:
    """No groups over real sockets, and no store."""
    from megatron.core import optimizer, parallel_state

    ranks.Waiting = lambda rank, world_size: None
    parallel_state.initialize_model_parallel = _without_gloo(parallel_state.initialize_model_parallel)
    for function in (assemble.Optimizer.__init__, matrices.muon_and_adam):
        function.__globals__["get_megatron_optimizer"] = partial(
            optimizer.get_megatron_optimizer, use_gloo_process_groups=False
        )


def _without_gloo(function: Callable[..., None]) -> Callable[..., None]:
    return lambda **sizes: function(**sizes | {"create_gloo_process_groups": False})


def sizes(recipe: Recipe, shape: ModelShape, rank: int) -> dict[str, int]:
    """What this rank allocates: elements, and bytes of weights, gradients and optimizer state."""
    run = resolve(recipe, shape=shape, run_dir=Path("/nowhere"), provenance={})
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run.layout.world_size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=rank, world_size=run.layout.world_size, store=FakeStore())
    try:
        with assemble.join_ranks(run) as place:
            place.device = torch.device("meta")
            engine = _engine(run, place)
            engine.optimizer.allocate_state(updates=1)
            return _measured(engine) | {"passes": _passes(run.layout)}
    finally:
        dist.destroy_process_group()


def _engine(run: RunConfig, place: ranks.Ranks) -> Engine:
    if not run.shape.multi_latent_attention:
        return assemble.build_engine(run, place, train_iters=10)
    from mcore_latent import latent_model

    made = {"build": lambda *_, **__: latent_model(run, place), "transformer_config": lambda *_, **__: None}
    with patch.multiple(assemble, **made):
        return assemble.build_engine(run, place, train_iters=10)


def _measured(engine: Engine) -> dict[str, int]:
    chunks: list[Any] = engine.model.wrapped
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    flat = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    return {
        "rank": engine.ranks.rank,
        "stage": engine.ranks.pp_rank,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": sum(map(_bytes, flat or parameters)),
        "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
        "optimizer": sum(_state_bytes(inner.optimizer) for inner in engine.optimizer.inner),
    }


def _passes(layout: Layout) -> int:
    """Forward passes of chunks before this rank's first backward pass."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    total, _, ahead, _ = get_pp_rank_microbatches(layout.num_microbatches, layout.vp, layout.pp)
    return min(total, ahead + 1)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Main copies, where they are not the weights themselves, and moments."""
    mains = [main for group in optimizer.param_groups for main in group["params"]]
    copies = sum(_bytes(main) for main in mains if not (main._is_view() or isinstance(main, torch.nn.Parameter)))
    moments = (x for main in mains for x in optimizer.state[main].values() if x.dim())
    return copies + sum(map(_bytes, moments))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    adapt()
    found = [[sizes(recipe, shape, rank) for rank in ranks] for recipe, shape, ranks in pickle.load(sys.stdin.buffer)]
    print(json.dumps(found))
