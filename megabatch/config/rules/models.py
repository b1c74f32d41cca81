"""The model: what a new one needs, what an existing one already determines, and what fits its experts."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megabatch.config.declare import Parameter, parameters
from megabatch.config.lengths import generates
from megabatch.config.moe import MoE
from megabatch.config.new_model import REQUIRED, SHAPE_FIELDS, moe_layers
from megabatch.config.recipe import Recipe
from megabatch.config.torch_dtype import torch_dtype
from megabatch.errors import Fault
from megabatch.plan.batch import nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


@functools.cache
def _shape_parameters() -> tuple[Parameter, ...]:
    return tuple(found for found in parameters(Recipe) if found.name in SHAPE_FIELDS.get(found.group, ()))


def new_model_is_described(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.model.model is not None:
        return
    missing = [name for name in REQUIRED if getattr(recipe.model, name) is None]
    if missing == list(REQUIRED):
        rule = f"is missing; give a folder or hub name, or {', '.join(REQUIRED)} for a new model"
        yield Fault("model.model", None, rule, bare=True)
        return
    for name in missing:
        yield Fault(f"model.{name}", None, "is missing: a new model needs it", bare=True)
    if recipe.moe.num_experts is not None and recipe.moe.moe_router_topk is None:
        yield Fault("moe.moe_router_topk", None, "is missing: a new model with num_experts needs it", bare=True)


def given_model_decides_its_shape(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """With `model` given its config.json decides; fields that say otherwise are an error."""
    if recipe.model.model is None or shape is None:
        return
    for parameter in _shape_parameters():
        value, own = getattr(getattr(recipe, parameter.group), parameter.name), getattr(shape, parameter.name)
        if value not in (parameter.default, own):
            yield Fault(parameter.dotted, value, f"must be unset or the model's own {own!r} (from its config.json)")
    frequency = recipe.moe.moe_layer_freq
    if frequency is not None and shape.moe_layers and moe_layers(recipe.moe, shape.num_layers) != shape.moe_layers:
        own_layers = [int(layer) for layer in shape.moe_layers]
        rule = f"must be unset or the model's own {own_layers} (from its config.json)"
        yield Fault("moe.moe_layer_freq", frequency, rule)


def new_tokens_begin_at_the_model(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    load = recipe.checkpoint.load
    if recipe.model.new_special_tokens and load is not None:
        rule = (
            "has an embedding of its own, which model.new_special_tokens does not extend; convert it with "
            "megabatch-convert --to_hf, and train from that folder as model.model"
        )
        yield Fault("checkpoint.load", load, rule)


def heads_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if shape is None or recipe.model.model is not None:
        return
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if recipe.model.kv_channels is None and shape.hidden_size % heads:
        rule = f"must be a multiple of num_attention_heads={heads} unless kv_channels is set"
        yield Fault("model.hidden_size", shape.hidden_size, rule, try_=nearest_multiples(shape.hidden_size, of=heads))
    elif shape.kv_channels % 2:
        rule = "must be even for rotary embeddings"
        yield Fault("model.kv_channels", shape.kv_channels, rule, try_=(shape.kv_channels + 1,))
    if heads % groups:
        rule = f"must be a multiple of num_query_groups={groups}"
        yield Fault("model.num_attention_heads", heads, rule, try_=nearest_multiples(heads, of=groups))
    if recipe.model.group_query_attention is False and recipe.model.num_query_groups > 1:
        rule = f"contradicts num_query_groups={recipe.model.num_query_groups}"
        yield Fault("model.group_query_attention", False, rule, try_=(True,))


def positions_suffice(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    length = recipe.data.max_length
    if shape is None or length is None:
        return
    most = shape.max_position_embeddings - generates(recipe)
    if length > most:
        wanted = "leave room for a completion within" if generates(recipe) else "be at most"
        rule = f"must {wanted} the model's max_position_embeddings={shape.max_position_embeddings}"
        yield Fault("data.max_length", length, rule, try_=(most,))


def dense_models_take_no_moe(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Speed-only settings may stay; what would change a mixture of experts is a mistake on a dense model."""
    if shape is None or shape.num_experts is not None:
        return
    for parameter in parameters(Recipe):
        value = getattr(getattr(recipe, parameter.group), parameter.name)
        if parameter.group == "moe" and not parameter.facts.speed_only and value != parameter.default:
            rule = f"has no effect: {shape.model_type} has no experts; leave it at {parameter.default!r}"
            yield Fault(parameter.dotted, value, rule)


def moe_layers_are_listed(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    frequency = recipe.moe.moe_layer_freq
    if shape is None or not isinstance(frequency, tuple):
        return
    if len(frequency) != shape.num_layers or set(frequency) - {0, 1}:
        rule = f"must have a 0 or 1 for each of the model's {shape.num_layers} layers"
        yield Fault("moe.moe_layer_freq", frequency, rule)


def router_is_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    moe = recipe.moe
    if shape is not None and shape.num_experts is not None and shape.moe_router_topk is not None:
        topk, pre_softmax = shape.moe_router_topk, shape.moe_router_pre_softmax
        if topk > shape.num_experts:
            yield Fault("moe.moe_router_topk", topk, f"must be at most num_experts={shape.num_experts}")
        if topk == 1 and not pre_softmax and moe.moe_router_score_function in (None, "softmax"):
            rule = "needs moe_router_pre_softmax: a softmax over one chosen expert has no gradient"
            yield Fault("moe.moe_router_topk", topk, rule)
    if (moe.moe_router_num_groups is None) != (moe.moe_router_group_topk is None):
        given = "num_groups" if moe.moe_router_group_topk is None else "group_topk"
        other = "group_topk" if given == "num_groups" else "num_groups"
        rule = f"needs moe_router_{other} too"
        yield Fault(f"moe.moe_router_{given}", getattr(moe, f"moe_router_{given}"), rule)


def balancing_is_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    moe = recipe.moe
    balancing = moe.moe_router_load_balancing_type
    if moe.moe_aux_loss_coeff and balancing in ("none", "sinkhorn"):
        rule = f"has no effect with moe_router_load_balancing_type={balancing!r}"
        yield Fault("moe.moe_aux_loss_coeff", moe.moe_aux_loss_coeff, rule, try_=(0,))
    if moe.moe_expert_capacity_factor is not None and balancing == "sinkhorn":
        rule = "cannot be combined with moe_router_load_balancing_type='sinkhorn'"
        yield Fault("moe.moe_expert_capacity_factor", moe.moe_expert_capacity_factor, rule)
    if moe.moe_pad_expert_input_to_capacity and moe.moe_expert_capacity_factor is None:
        rule = "needs moe_expert_capacity_factor, which is None"
        yield Fault("moe.moe_pad_expert_input_to_capacity", True, rule, try_=(False,))
    elif moe.moe_pad_expert_input_to_capacity:
        yield from _padding_to_capacity_fits(recipe, shape)


DEEPEP_SIZES = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Ranks between which DeepEP exchanges tokens (`Buffer.get_dispatch_config`)."""


def deepep_can_dispatch(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    moe, field = recipe.moe, "moe.moe_token_dispatcher_type"
    if moe.moe_token_dispatcher_type != "flex":
        if moe.moe_enable_deepep:
            yield Fault("moe.moe_enable_deepep", True, "needs moe_token_dispatcher_type='flex'", try_=(False,))
        if (given := moe.moe_deepep_num_sms) != MoE().moe_deepep_num_sms:
            yield Fault("moe.moe_deepep_num_sms", given, "needs moe_token_dispatcher_type='flex'")
        return
    if not recipe.resources.gpus_per_node:
        rule = "is DeepEP's kernels, which run on GPUs, and resources.gpus_per_node is 0"
        yield Fault(field, "flex", rule, try_=("alltoall",))
    if shape is not None and (dtype := torch_dtype(recipe, shape)) != "bfloat16":
        rule = f"needs the model's torch_dtype to be 'bfloat16', which DeepEP exchanges, and it is {dtype!r}"
        yield Fault(field, "flex", rule, try_=("alltoall",))
    if layout is not None and (size := layout.ep * layout.etp) not in DEEPEP_SIZES:
        sizes = ", ".join(map(str, DEEPEP_SIZES))
        rule = f"needs expert_model_parallel_size * expert_tensor_parallel_size, which is {size}, to be one of {sizes}"
        yield Fault(field, "flex", rule, try_=("alltoall",))
    if moe.moe_deepep_num_sms % 2:
        yield Fault("moe.moe_deepep_num_sms", moe.moe_deepep_num_sms, "must be even")
    for name in ("moe_shared_expert_overlap", "moe_pad_expert_input_to_capacity"):
        if getattr(moe, name):
            yield Fault(f"moe.{name}", True, "cannot be combined with moe_token_dispatcher_type='flex'", try_=(False,))


def _padding_to_capacity_fits(recipe: Recipe, shape: ModelShape | None) -> Iterator[Fault]:
    """Experts' inputs are padded with tokens of this rank's own part of a row."""
    factor = recipe.moe.moe_expert_capacity_factor
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        if (size := getattr(recipe.parallel, name)) > 1:
            rule = f"needs {name}=1, which is {size}: a row's capacity includes the parts of all ranks"
            yield Fault("moe.moe_pad_expert_input_to_capacity", True, rule, try_=(False,))
    if shape is None or shape.num_experts is None or factor is None or not shape.moe_router_topk:
        return
    most = shape.num_experts / shape.moe_router_topk
    if factor > most:
        rule = f"must be at most num_experts/moe_router_topk={most:g} if inputs are padded: no row has more tokens"
        yield Fault("moe.moe_expert_capacity_factor", factor, rule, try_=(most,))


RULES = (
    new_model_is_described,
    given_model_decides_its_shape,
    new_tokens_begin_at_the_model,
    heads_divide,
    positions_suffice,
    dense_models_take_no_moe,
    moe_layers_are_listed,
    router_is_consistent,
    balancing_is_consistent,
    deepep_can_dispatch,
)
