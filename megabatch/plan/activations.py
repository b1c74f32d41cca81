"""Activations that the backward pass needs, layer by layer, with and without recomputation.

After Korthikanti et al. (arXiv:2205.05198, section 4), counted tensor by tensor for what megatron-core's layers save
today: grouped queries, gated MLPs, flash attention, no dropout, experts. Sizes are bytes on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megabatch.plan.adapters import is_target, matrices
from megabatch.plan.flops import head_channels
from megabatch.plan.routing import routed_tokens
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.weights import Kind
from megabatch.values import dataclass

_DROPPED: Mapping[str, tuple[str, ...]] = {
    "core_attn": ("scores",),
    "layernorm": ("attention_norm", "mlp_norm"),
    "mla_up_proj": ("up_projected",),
    "mlp": ("mlp",),
    "moe": ("router", "experts", "experts_act", "shared_experts"),
    "moe_act": ("experts_act",),
}
"""What each of `recompute_modules` leaves out."""

LSE_BYTES, FP32_BYTES, STATE_CHUNK = 4, 4, 64
"""Bytes of flash attention's log-sum-exp per head and token; bytes of a router's scores; number of tokens per state
that a linear attention keeps."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes for one micro-batch in one layer."""

    whole: float
    """Without recomputation."""
    kept: float
    """With the run's selective recomputation."""
    working: float
    """The largest gradients and gathered or exchanged rows that exist on top of these while the layer runs."""
    passing: float
    """In a pass without gradients: all that full training would keep, and gathered or exchanged rows on top. The layer
    frees most of it while it runs."""


def stream(shape: ModelShape, settings: Settings) -> float:
    """The residual stream of a micro-batch."""
    return settings.micro_batch_tokens * shape.hidden_size * settings.weight_bytes / settings.sp


def keys_values(shape: ModelShape, settings: Settings) -> float:
    """Keys and values of a micro-batch's part on this rank, in one layer."""
    channels = 2 * shape.num_query_groups * shape.kv_channels
    return settings.micro_batch_tokens * channels * settings.weight_bytes / settings.layout.tp


def layer_activations(shape: ModelShape, settings: Settings, kind: Kind) -> LayerActivations:
    saved = _saved(shape, settings, kind)
    whole = sum(saved.values())
    dropped = 0.0
    if settings.recompute_granularity == "selective":
        names = {name for module in settings.recompute_modules for name in _DROPPED[module]}
        dropped = sum(size for name, size in saved.items() if name in names)
    every = _saved(shape, replace(settings, lora=None), kind)  # frozen or not, each product has its input
    passing = sum(every.values()) + _moved(shape, settings, kind)
    return LayerActivations(whole, whole - dropped, _working(shape, settings, kind, saved), passing)


def _saved(shape: ModelShape, settings: Settings, kind: Kind) -> dict[str, float]:
    moe, linear = kind
    mixer = _linear_attention if linear else _latent_attention if shape.multi_latent_attention else _attention
    rows = stream(shape, settings)
    saved = {"input": rows, "attention_norm": rows, **mixer(shape, settings), "mlp_input": rows, "mlp_norm": rows}
    if shape.post_layernorms:
        saved["post_norms"] = 2 * rows
    saved |= _experts(shape, settings) if moe else _dense_mlp(shape, settings)
    plain = not linear and not shape.multi_latent_attention
    return _beside_adapters(saved, shape, settings, moe=moe) if settings.lora and plain else saved


def _beside_adapters(
    saved: Mapping[str, float], shape: ModelShape, settings: Settings, *, moe: bool
) -> dict[str, float]:
    """What a layer of frozen matrices keeps: inputs only where an adapter needs them (with dropout, a dropped-out copy
    and its mask), each adapter's narrow product, and B as wide as a fused layer.

    Attention itself keeps its output, and a router its input, frozen or not.
    """
    lora, size = settings.lora, settings.weight_bytes
    assert lora is not None
    kept = dict(saved)
    for one in _frozen_matrices(shape, settings, moe=moe):
        own = 0.0 if one.kept_as == "attention_output" else one.bytes
        kept[one.kept_as] -= own
        if is_target(one.module, lora):
            rank = lora.rank * matrices(one.module, lora) * size
            kept[one.kept_as] += (one.bytes * (1 + 1 / size) if lora.dropout else own) + one.tokens * rank
            kept[one.kept_as] += one.rows * rank if matrices(one.module, lora) > 1 else 0.0
    return kept


class _Frozen(NamedTuple):
    """A frozen matrix, or one of each of a rank's experts."""

    module: str
    kept_as: str
    """Where `_saved` counts its input."""
    bytes: float
    """Of its input."""
    tokens: float
    rows: float
    """On this rank."""


def _frozen_matrices(shape: ModelShape, settings: Settings, *, moe: bool) -> tuple[_Frozen, ...]:
    layout, tokens, size = settings.layout, settings.micro_batch_tokens, settings.weight_bytes
    rows, routed = stream(shape, settings), routed_tokens(shape, settings) if moe else tokens
    width = (shape.moe_ffn_hidden_size or 0) / layout.etp if moe else shape.ffn_hidden_size / layout.tp
    heads = shape.num_attention_heads * shape.kv_channels / layout.tp
    projected = heads + 2 * shape.num_query_groups * shape.kv_channels / layout.tp
    experts = (shape.num_experts or 0) / layout.ep if moe else 1
    hidden = routed * size * shape.hidden_size if moe else rows
    mlp, norm, act = ("mlp.experts", "experts", "experts_act") if moe else ("mlp", "mlp_norm", "mlp")
    return (
        _Frozen("self_attention.linear_qkv", "attention_norm", rows, tokens, projected),
        _Frozen("self_attention.linear_proj", "attention_output", heads * tokens * size, tokens, shape.hidden_size),
        _Frozen(f"{mlp}.linear_fc1", norm, hidden, routed, 2 * width * experts),
        _Frozen(f"{mlp}.linear_fc2", act, routed * size * width, routed, shape.hidden_size * experts),
    )


def _attention(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """The projection's output (which contains the values), queries and keys after rotation, and the output.

    Ranks that share a query group gather all their projections: a rank's values are then a part of the gathered ones.
    """
    tp = settings.layout.tp
    a_channel = settings.micro_batch_tokens * settings.weight_bytes * shape.kv_channels / tp
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    projected = heads * (1 + shape.attention_output_gate) + 2 * groups
    kept = projected + groups if groups >= tp else projected * tp + tp
    return {
        "qkv": a_channel * (kept + heads),
        "scores": _scores(shape, settings),
        "attention_output": a_channel * heads * (1 + shape.attention_output_gate),
    }


def _scores(shape: ModelShape, settings: Settings) -> float:
    """Flash attention's log-sum-exp, or the softmax of every pair of tokens."""
    each = settings.mean_length * settings.weight_bytes if settings.attention_scores else LSE_BYTES
    return settings.micro_batch_tokens * shape.num_attention_heads / settings.layout.tp * each


def _latent_attention(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """Tensor parallelism does not cut the latents before and after their norms; it cuts their up-projections."""
    tokens, tp = settings.micro_batch_tokens * settings.weight_bytes, settings.layout.tp
    key, value = head_channels(shape)
    queries, latent = shape.q_lora_rank or 0, shape.kv_lora_rank or 0
    heads = tokens * shape.num_attention_heads / tp
    return {
        "latents": tokens * (2 * queries + 2 * latent + (shape.qk_pos_emb_head_dim or 0)) / settings.sp,
        "up_projected": heads * (2 * key + value),
        "scores": _scores(shape, settings),
        "attention_output": heads * value,
    }


def _linear_attention(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """Projections, their convolution, normalised queries and keys, chunk states, the gated norm's input and output."""
    tokens = settings.micro_batch_tokens * settings.weight_bytes / settings.layout.tp
    heads, value = shape.linear_num_value_heads or 0, shape.linear_value_head_dim or 0
    key = shape.linear_key_head_dim or 0
    keys, values = (shape.linear_num_key_heads or 0) * key, heads * value
    return {
        "qkv": tokens * (2 * keys + 2 * values + 2 * heads + 2 * (2 * keys + values)),
        "states": tokens * heads * key * value / STATE_CHUNK,
        "attention_output": tokens * 3 * values,
    }


def _dense_mlp(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """Gate and up projection, and their product; unfused also the activated gate and a copy of the other half."""
    tokens = settings.micro_batch_tokens * settings.weight_bytes / settings.layout.tp
    return {"mlp": tokens * (3 if settings.transformer_engine else 5) * shape.ffn_hidden_size}


def _experts(shape: ModelShape, settings: Settings) -> dict[str, float]:
    tokens, size = routed_tokens(shape, settings), settings.weight_bytes
    width = (shape.moe_ffn_hidden_size or 0) / settings.layout.etp
    own = settings.micro_batch_tokens / settings.sp
    shared = settings.micro_batch_tokens * (shape.moe_shared_expert_intermediate_size or 0) / settings.layout.tp
    return {
        "router": own * (shape.num_experts or 0) * 3 * FP32_BYTES,
        "experts": tokens * size * (shape.hidden_size + 2 * width),
        # unfused as in a dense MLP, and the product once more without its weight
        "experts_act": tokens * size * width * (1 if settings.transformer_engine else 4),
        "shared_experts": size * 3 * shared,
    }


def _working(shape: ModelShape, settings: Settings, kind: Kind, saved: Mapping[str, float]) -> float:
    """In a module's backward pass, what it saved has gradients of the same size; the larger of the two counts."""
    moe, _ = kind
    gathered = _gathered(shape, settings)
    mixer = saved.get("qkv", 0.0) + saved.get("up_projected", 0.0) + saved["attention_output"]
    mixer += _others_keys(shape, settings, kind, gradients=True)
    if not moe:
        return 2 * saved["input"] + gathered + max(mixer, saved["mlp"])
    experts = _exchanged(shape, settings) + saved["experts"] + saved["experts_act"] + saved["shared_experts"]
    return 2 * saved["input"] + max(gathered + mixer, experts)


def _moved(shape: ModelShape, settings: Settings, kind: Kind) -> float:
    """Rows of other ranks, and rows on their way to experts, in a forward pass."""
    mixer = _gathered(shape, settings) + _others_keys(shape, settings, kind, gradients=False)
    return max(mixer, _exchanged(shape, settings)) if kind[0] else mixer


def _gathered(shape: ModelShape, settings: Settings) -> float:
    """A whole row where sequence parallelism cuts it."""
    return settings.micro_batch_tokens * shape.hidden_size * settings.weight_bytes if settings.sp > 1 else 0.0


def _exchanged(shape: ModelShape, settings: Settings) -> float:
    """Rows as they come from other ranks' routers, and as they go back."""
    return 2 * routed_tokens(shape, settings) * shape.hidden_size * settings.weight_bytes


def _others_keys(shape: ModelShape, settings: Settings, kind: Kind, *, gradients: bool) -> float:
    """Keys and values of other context parallel ranks while a layer attends to them.

    Transformer Engine's ring holds those of two ranks and their gradients. Ours holds the whole row's twice, once as
    gathered and once in the order of the chunks that see them, and in the backward pass the gradients of the latter.
    """
    cp = settings.layout.cp
    if cp == 1 or kind[1]:
        return 0.0
    forward, backward = (2, 2) if settings.transformer_engine else (2 * cp, cp + 1)
    return keys_values(shape, settings) * (forward + backward * gradients)
