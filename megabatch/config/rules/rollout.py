"""Rules for the engines that generate GRPO's completions."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Rollout
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

ROLE = "rollout"
"""Name of the role whose servers a run generates with."""
_OF_SERVERS = (
    "vllm_server_host", "vllm_server_base_url", "vllm_server_port", "vllm_server_timeout", "vllm_server_group_port",
)  # fmt: skip
_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head dimensions that vLLM 0.32 computes on CPUs (its `v1/attention/backends/cpu_attn.py`)."""
_HEADS_ON_GPUS = tuple(range(8, 257, 8))
"""Those that FlashAttention computes."""


def one_engine_is_named(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """vLLM is used when it is asked for, in one way, and settings of vLLM are for runs with vLLM."""
    rollout, defaults = recipe.rollout, Rollout()
    if rollout.use_vllm is False and rollout.vllm_mode is not None:
        yield Fault("rollout.vllm_mode", rollout.vllm_mode, "has no effect with use_vllm=False", try_=(None,))
        return
    if rollout.use_vllm and rollout.vllm_mode is None:
        yield Fault("rollout.vllm_mode", None, "must be given with use_vllm=True", try_=("'server'",))
    if rollout.vllm_mode == "server":
        return
    for name in _OF_SERVERS:
        if getattr(rollout, name) != getattr(defaults, name):
            yield Fault(f"rollout.{name}", getattr(rollout, name), "has no effect without vllm_mode='server'")


def servers_can_be_found(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """By one of an address, a host, and a role of the job."""
    rollout = recipe.rollout
    if rollout.vllm_mode != "server":
        return
    has_role = any(role.name == ROLE for role in recipe.roles)
    ways = [rollout.vllm_server_base_url is not None, rollout.vllm_server_host is not None, has_role]
    if sum(ways) != 1:
        rule = (
            "needs servers, from exactly one of vllm_server_base_url, vllm_server_host with vllm_server_port, and a "
            f"role named {ROLE!r}; given are {sum(ways)}"
        )
        yield Fault("rollout.vllm_mode", "server", rule)


def generating_ahead_is_possible(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """`async_generate` needs an engine that works while the ranks train, and a loss that can be corrected."""
    rollout = recipe.rollout
    if not rollout.async_generate:
        if rollout.max_staleness != Rollout().max_staleness:
            yield Fault("rollout.max_staleness", rollout.max_staleness, "has no effect without async_generate=True")
        return
    if rollout.vllm_mode != "server":
        where = "colocated vLLM runs" if rollout.vllm_mode == "colocate" else "transformers runs"
        rule = (
            f"needs vllm_mode='server': {where} inside the ranks, which cannot generate while they train; give "
            "servers nodes of their own (docs/rollouts.md)"
        )
        yield Fault("rollout.async_generate", True, rule, try_=(False,))
    if rollout.sleep_level:
        rule = "puts the engine to sleep while the ranks train, and with async_generate it generates then"
        yield Fault("rollout.sleep_level", rollout.sleep_level, rule, try_=(0,))
    for name in ("multi_turn_scheduler", "gym_env"):
        if (value := getattr(rollout, name)) is not None:
            rule = "answers the model on rank 0 while all ranks wait, and with async_generate they train then"
            yield Fault(f"rollout.{name}", value, rule, try_=(None,))
    if recipe.grpo.loss_type == "real":
        rule = "has no importance ratio, and so cannot correct the stale completions of async_generate"
        yield Fault("grpo.loss_type", "real", rule, try_=("'grpo'",))


def vllm_computes_these_heads(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    rollout = recipe.rollout
    if shape is None or rollout.vllm_mode is None or rollout.use_vllm is False:
        return
    known = _HEADS_ON_GPUS if recipe.resources.gpus_per_node else _HEADS
    if (heads := shape.kv_channels) not in known:
        nearest = sorted(known, key=lambda size: (abs(size - heads), size))[:2]
        rule = "is a head dimension that vLLM 0.32 does not compute; use vllm_mode=None"
        yield Fault("model.kv_channels", heads, rule, try_=nearest)


RULES = (one_engine_is_named, servers_can_be_found, generating_ahead_is_possible, vllm_computes_these_heads)
