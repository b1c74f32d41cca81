"""The rollout engines that a recipe asks for."""

from __future__ import annotations

import os
import uuid

import torch

from megabatch.config.grpo import Rollout
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.rollout.ahead import Ahead
from megabatch.rollout.local.transformers_engine import TransformersEngine
from megabatch.rollout.vllm.guard import TOKEN
from megabatch.trainer.data.dataset import share_of
from megabatch.trainer.model.transformer_config import DTYPES
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sync.colocate import adapted, open_colocated
from megabatch.trainer.sync.rollouts import Rollouts
from megabatch.trainer.sync.servers import Wanted, open_pool

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Of log-probabilities, where a recipe sets none. Engines round at other places than the trainer: in float32 they
differ by 1e-5, in bfloat16 by up to 0.24."""


def open_rollouts(run: RunConfig, source: ModelSource, ranks: Ranks) -> Rollouts:
    """The engines of a run, without weights; collective. Raises: RolloutError on every rank."""
    rollout = run.recipe.rollout
    if rollout.vllm_mode == "colocate":
        return open_colocated(run, source, ranks, tolerance=_tolerance(run))
    if rollout.vllm_mode != "server":
        records_routes = run.recipe.grpo.router_replay_mode == "R3"
        positions = run.shape.max_position_embeddings
        return in_ranks(run, source, ranks, positions=positions, records_routes=records_routes)
    found, wanted = [], _wanted(run, source, ranks.device)

    def opened() -> int:
        pool, takes = open_pool(addresses(rollout), wanted)
        found.append(pool)
        return takes

    takes = ranks.on_main(opened)
    pool = found[0] if found else None
    return Rollouts(
        pool,
        ranks,
        source.family,
        receivers="main",
        experts="per_expert",
        share=share_of(run, ranks),
        tolerance=_tolerance(run),
        positions=wanted.longest - 1,  # vLLM scores what it draws one more token after
        takes=takes,
        adapters=rollout.vllm_enable_lora,
        ahead=Ahead(pool.stream) if pool is not None and rollout.async_generate else None,
    )


def in_ranks(
    run: RunConfig, source: ModelSource, ranks: Ranks, *, positions: int, records_routes: bool = False
) -> Rollouts:
    """An engine of transformers on every rank, without weights.

    Args: source: of the policy, or of another model; positions: tokens that it takes; records_routes: whether
    completions have the experts of their tokens.
    """
    dtype = DTYPES[resolved(run.recipe.model.torch_dtype)]
    folder, device = source.config_folder, ranks.device
    engine = ranks.each(lambda: TransformersEngine(folder, dtype=dtype, device=device, records_routes=records_routes))
    return Rollouts(
        engine,
        ranks,
        source.family,
        experts=engine.experts,
        share=share_of(run, ranks),
        tolerance=_tolerance(run),
        positions=positions,
    )


def _tolerance(run: RunConfig) -> float:
    """Most that log-probabilities of trainer and engines may differ by after an update."""
    given = run.recipe.rollout.sync_tolerance
    return _TOLERANCE[DTYPES[resolved(run.recipe.model.torch_dtype)]] if given is None else given


def addresses(rollout: Rollout) -> list[str]:
    """Of the servers: from the recipe, or from the role `rollout` of the job."""
    if rollout.vllm_server_base_url is not None:
        return [url.strip() for url in rollout.vllm_server_base_url.split(",")]
    if rollout.vllm_server_host is not None:
        hosts = rollout.vllm_server_host.split(",")
        return [f"http://{host.strip()}:{rollout.vllm_server_port}" for host in hosts]
    return os.environ["MEGABATCH_ROLE_ROLLOUT"].split(",")


def _wanted(run: RunConfig, source: ModelSource, device: torch.device) -> Wanted:
    rollout = run.recipe.rollout
    longest = resolved(run.recipe.data.max_length) + rollout.max_completion_length
    return Wanted(
        shape=run.shape,
        dtype=resolved(run.recipe.model.torch_dtype),
        longest=min(longest, run.shape.max_position_embeddings),
        owner=uuid.uuid4().hex[:12],
        device=device,
        token=os.environ.get(TOKEN),
        timeout_s=rollout.vllm_server_timeout,
        group_port=rollout.vllm_server_group_port,
        lora_rank=run.recipe.tuner.lora_rank if rollout.vllm_enable_lora else None,
        lora_layers=adapted(run, source) if rollout.vllm_enable_lora else (),
    )
