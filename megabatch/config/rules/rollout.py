"""Rules for the engines that generate GRPO's completions."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Rollout
from megabatch.config.lengths import row_tokens
from megabatch.config.recipe import Recipe
from megabatch.config.server_addresses import EXAMPLE, address_fault, host_fault, twice
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

ROLE = "rollout"
"""Name of the role whose servers a run generates with."""
_OF_SERVERS = (
    "vllm_server_host", "vllm_server_base_url", "vllm_server_port", "vllm_server_timeout", "vllm_server_group_port",
)  # fmt: skip
_OF_COLOCATE = (
    "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization", "vllm_max_model_len", "vllm_enforce_eager",
    "vllm_enable_prefix_caching", "vllm_max_num_seqs", "vllm_disable_cascade_attn", "vllm_engine_kwargs",
)  # fmt: skip
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 makes room for."""
_NOT_ADAPTED = ("all-router", "router", "all-embedding", "word_embeddings", "embed_tokens", "output_layer", "lm_head")
_DECIDED = {
    "tensor_parallel_size": "vllm_tensor_parallel_size", "max_model_len": "vllm_max_model_len",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization", "enforce_eager": "vllm_enforce_eager",
    "enable_prefix_caching": "vllm_enable_prefix_caching", "max_num_seqs": "vllm_max_num_seqs",
    "disable_cascade_attn": "vllm_disable_cascade_attn", "enable_sleep_mode": "sleep_level",
    "enable_lora": "vllm_enable_lora", "max_lora_rank": "vllm_enable_lora", "max_loras": "vllm_enable_lora",
    "lora_target_modules": "vllm_enable_lora",
    **dict.fromkeys(("model", "dtype", "seed", "load_format", "skip_tokenizer_init", "distributed_executor_backend",
                     "pipeline_parallel_size", "data_parallel_size", "logprobs_mode", "generation_config",
                     "quantization"), ""),
}  # fmt: skip
"""vLLM's arguments that `vllm_engine_kwargs` may not set: what sets each, "" for the run itself."""
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
        yield Fault("rollout.vllm_mode", None, "must be given with use_vllm=True", try_=("'colocate'", "'server'"))
    for names, mode in ((_OF_SERVERS, "server"), (_OF_COLOCATE, "colocate")):
        also = "; servers have it as a flag of their own, see `megabatch rollout`" if rollout.vllm_mode else ""
        for name in names if rollout.vllm_mode != mode else ():
            if (value := getattr(rollout, name)) != getattr(defaults, name):
                rule = f"has no effect without vllm_mode={mode!r}{also if mode == 'colocate' else ''}"
                yield Fault(f"rollout.{name}", value, rule)


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
    for name, given, fault_of in (
        ("vllm_server_base_url", rollout.vllm_server_base_url, address_fault),
        ("vllm_server_host", rollout.vllm_server_host, host_fault),
    ):
        found = [] if given is None else [one.strip() for one in given.split(",")]
        for one in found:
            if (why := fault_of(one)) is not None:
                yield Fault(f"rollout.{name}", one, why, try_=(EXAMPLE if name.endswith("url") else "'localhost'",))
        if (again := twice(found)) is not None:
            yield Fault(f"rollout.{name}", given, f"names {again} twice; each server counts once")


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
    elif shape.model_type == "qwen2" and heads * shape.num_attention_heads != shape.hidden_size:
        rule = "is another head dimension than hidden_size / num_attention_heads, and vLLM 0.32 gives qwen2 no other"
        yield Fault("model.kv_channels", heads, rule, try_=(shape.hidden_size // shape.num_attention_heads,))


def engines_divide_the_ranks(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Ranks into engines, on CPUs those of a node, and the model's heads over an engine's ranks."""
    size, field = recipe.rollout.vllm_tensor_parallel_size, "rollout.vllm_tensor_parallel_size"
    if recipe.rollout.vllm_mode != "colocate" or size == 1:
        return
    resources = recipe.resources
    each, what = resources.world_size, "the run's ranks"
    if not resources.gpus_per_node and resources.nodes > 1:
        each, what = resources.world_size // resources.nodes, "a node's ranks (without GPUs no engine spans nodes)"
    if each % size:
        yield Fault(field, size, f"must divide {each}, {what}", try_=_divisors(each, size))
    elif shape is not None and shape.num_attention_heads % size:
        rule = f"must divide model.num_attention_heads={shape.num_attention_heads}"
        yield Fault(field, size, rule, try_=_divisors(shape.num_attention_heads, size))
    elif shape is not None and shape.num_query_groups % size and size % shape.num_query_groups:
        rule = f"must divide model.num_query_groups={shape.num_query_groups}, or be a multiple of it"
        yield Fault(field, size, rule, try_=_divisors(shape.num_query_groups, size))


def _divisors(number: int, near: int) -> list[int]:
    """The two divisors of a number that are nearest to another."""
    found = [one for one in range(1, number + 1) if number % one == 0]
    return sorted(sorted(found, key=lambda one: (abs(one - near), one))[:2])


def engines_take_whole_completions(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """vLLM would cut what is longer than `vllm_max_model_len`."""
    most, field = recipe.rollout.vllm_max_model_len, "rollout.vllm_max_model_len"
    if recipe.rollout.vllm_mode != "colocate" or most is None:
        return
    longest = row_tokens(recipe, shape)
    if longest is not None and most < longest:
        rule = f"must be at least {longest}: data.max_length and rollout.max_completion_length together"
        yield Fault(field, most, rule, try_=(longest, None))
    if shape is not None and most > shape.max_position_embeddings:
        rule = f"is above model.max_position_embeddings={shape.max_position_embeddings}"
        yield Fault(field, most, rule, try_=(shape.max_position_embeddings, None))


def engine_kwargs_are_vllms_own(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Nothing that another setting or the run decides."""
    for name, value in (recipe.rollout.vllm_engine_kwargs or {}).items():
        if (setting := _DECIDED.get(name)) is not None:
            rule = f"is set by rollout.{setting}" if setting else "follows from the run and cannot be set"
            yield Fault(f"rollout.vllm_engine_kwargs[{name!r}]", value, rule)


def adapters_fit_the_engine(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """What vLLM takes of an adapter without the weights below it."""
    rollout, tuner, field = recipe.rollout, recipe.tuner, "rollout.vllm_enable_lora"
    if not rollout.vllm_enable_lora:
        return
    if rollout.vllm_mode is None:
        rule = "needs vLLM (vllm_mode='colocate' or 'server'); transformers gets merged weights"
        yield Fault(field, True, rule, try_=(False,))
    if tuner.tuner_type != "lora":
        yield Fault(field, True, f"needs tuner.tuner_type='lora', not {tuner.tuner_type!r}", try_=(False,))
        return
    if shape is not None and shape.num_experts:
        rule = (
            "is not for mixtures of experts: with room for adapters vLLM computes experts by Triton alone, which CPUs "
            "lack, and no GPU has shown that it agrees with the trainer; without it vLLM gets merged weights"
        )
        yield Fault(field, True, rule, try_=(False,))
    for name, value in (("modules_to_save", tuner.modules_to_save), ("lora_bias", tuner.lora_bias)):
        if value not in ((), "none"):
            rule = "trains the model's own parameters, which vllm_enable_lora=True does not send"
            yield Fault(f"tuner.{name}", value, rule)
    if found := [name for name in tuner.target_modules if name.rpartition(".")[2] in _NOT_ADAPTED]:
        rule = "has layers that vLLM does not adapt; with vllm_enable_lora=True name linear layers of the decoder"
        yield Fault("tuner.target_modules", found, rule)
    if tuner.lora_rank > ADAPTER_RANKS[-1]:
        rule = f"is above {ADAPTER_RANKS[-1]}, the most that vLLM takes with vllm_enable_lora=True"
        yield Fault("tuner.lora_rank", tuner.lora_rank, rule, try_=(ADAPTER_RANKS[-1],))


def the_trainer_makes_room(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """For engines on its own devices."""
    if recipe.rollout.vllm_mode == "server":
        for name in ("offload_model", "offload_optimizer"):
            if getattr(recipe.rollout, name):
                rule = "has no effect with vllm_mode='server', whose engines do not share the trainer's devices"
                yield Fault(f"rollout.{name}", True, rule, try_=(False,))


RULES = (
    the_trainer_makes_room,
    one_engine_is_named,
    servers_can_be_found,
    generating_ahead_is_possible,
    vllm_computes_these_heads,
    engines_divide_the_ranks,
    engines_take_whole_completions,
    engine_kwargs_are_vllms_own,
    adapters_fit_the_engine,
)
