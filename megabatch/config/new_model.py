"""The shape that a recipe declares for a new model."""

from __future__ import annotations

from dataclasses import replace

from megabatch.config.moe import MoE
from megabatch.config.recipe import Recipe
from megabatch.config.windows import declared_window
from megabatch.plan.shape import ModelShape

REQUIRED = ("model_type", "num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
"""Fields of Model without which nothing can be made."""

SHAPE_FIELDS = {
    "model": (
        "model_type",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "max_position_embeddings",
        "rotary_base",
        "rope_scaling",
        "norm_epsilon",
        "untie_embeddings_and_output_weights",
        "add_qkv_bias",
        "qk_layernorm",
    ),
    "moe": (
        "num_experts",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_router_topk",
        "moe_router_pre_softmax",
    ),
}
"""Fields that a model's config.json decides, under the same name in `ModelShape`."""
_FURTHER_FIELDS = {
    "model": ("group_query_attention", "window_size", "window_attn_skip_freq", "padded_vocab_size"),
    "moe": ("moe_layer_freq",),
}
"""Others that say what a new model is."""


def without_new_model(recipe: Recipe) -> Recipe:
    """The recipe with the defaults of every field that describes a new model's shape."""
    for of_group in (SHAPE_FIELDS, _FURTHER_FIELDS):
        for group, names in of_group.items():
            own = getattr(recipe, group)
            defaults = type(own)()
            own = replace(own, **{name: getattr(defaults, name) for name in names})
            recipe = replace(recipe, **{group: own})
    return recipe


def declared_shape(recipe: Recipe, *, architecture: str = "") -> ModelShape | None:
    """The shape of a new model, or None where `model.model` is given or a needed field is missing.

    What a family fixes (bias on qkv, norms on query and key) is the family's to correct: pass the shape through
    its `hf_config` and `shape`.
    """
    model, moe = recipe.model, recipe.moe
    layers, hidden, heads = model.num_layers, model.hidden_size, model.num_attention_heads
    if model.model is not None or not (model.model_type and layers and hidden and heads and model.padded_vocab_size):
        return None
    grouped = model.group_query_attention if model.group_query_attention is not None else model.num_query_groups > 1
    ffn_hidden_size = model.ffn_hidden_size or 4 * hidden
    experts = moe.num_experts is not None
    sliding_window, window_layers = declared_window(model, layers)
    return ModelShape(
        architecture=architecture,
        model_type=model.model_type,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=model.num_query_groups if grouped else heads,
        kv_channels=model.kv_channels or max(1, hidden // heads),
        vocab_size=model.padded_vocab_size,
        max_position_embeddings=model.max_position_embeddings or recipe.data.max_length or 2048,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        norm_epsilon=model.norm_epsilon,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        sliding_window=sliding_window,
        window_layers=window_layers,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        num_experts=moe.num_experts,
        moe_layers=moe_layers(moe, layers) if experts else (),
        moe_ffn_hidden_size=(moe.moe_ffn_hidden_size or ffn_hidden_size) if experts else None,
        moe_router_topk=moe.moe_router_topk if experts else None,
        moe_router_pre_softmax=bool(moe.moe_router_pre_softmax),
        moe_shared_expert_intermediate_size=moe.moe_shared_expert_intermediate_size,
    )


def moe_layers(moe: MoE, num_layers: int) -> tuple[bool, ...]:
    """For each layer whether it is a mixture of experts: every `moe_layer_freq`-th, counted from the first."""
    frequency = moe.moe_layer_freq or 1
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    return tuple(map(bool, frequency))
