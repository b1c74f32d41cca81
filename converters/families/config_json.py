"""Reads and writes config.json for decoder-only families: old and new spellings, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

Config = Mapping[str, Any]

_LARGEST = 1 << 32
"""Of a dimension."""
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 100_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 100_000),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 100_000),
}
"""Upper limit for counts of a model's parts: a table has a row for each part."""


def architecture(config: Config, *, default: str) -> str:
    """The Hugging Face class name."""
    names = config.get("architectures") or [default]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        known = names if isinstance(names, str) else default or "LlamaForCausalLM"
        raise ConversionError(
            f'config.json: architectures={short(names)} must be a list of class names, such as ["{known}"]'
        )
    return str(names[0])


def short(value: object) -> str:
    """A value in short form, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def size(config: Config, *names: str, default: int | None = None) -> int:
    """A positive whole number under the first of its spellings that is set.

    Raises: ConversionError when none is set (and there is no default) or the value is no positive whole number.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConversionError(f"config.json: {name}={short(value)} must be a positive whole number")
        most = _MOST.get(name, _LARGEST)
        if value > most:
            raise ConversionError(f"config.json: {name}={short(value)} must be at most {most}, as in any real model")
        return value
    if default is None:
        raise ConversionError(f"config.json: {names[0]} is missing; it gives the shape of the model")
    return default


def number(config: Config, name: str, *, default: float) -> float:
    """A positive number, or the default that transformers uses when it is not set."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        raise ConversionError(f"config.json: {name}={short(value)} must be a positive number")
    return float(value)


def switch(config: Config, name: str, *, default: bool = False) -> bool:
    """True or false, or the default that transformers uses when it is not set."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConversionError(f"config.json: {name}={short(value)} must be true or false")
    return value


def rope(config: Config, *, default_theta: float = 10000.0) -> tuple[float, dict[str, Any] | None]:
    """Base of the rotary embedding and, unless it is plain, its other parameters with `rope_type`.

    Reads transformers 5's `rope_parameters` and the older `rope_theta` with `rope_scaling` (whose type was `type`).
    Raises: ConversionError for what it cannot read, and for two that differ: transformers drops `rope_parameters`
    then, with the base in it.
    """
    given, older = config.get("rope_parameters"), config.get("rope_scaling")
    found = _rope(config, given or older or {}, default_theta=default_theta)
    if given and older and found != _rope(config, older, default_theta=default_theta):
        raise ConversionError(
            "config.json: rope_scaling and rope_parameters differ, and programs go by the one or the other; keep one, "
            "with rope_theta in it"
        )
    return found


def _rope(config: Config, given: Any, *, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ConversionError(f"config.json: rope parameters by layer type are not supported yet: {short(given)}")
    theta = number(given if "rope_theta" in given else config, "rope_theta", default=default_theta)
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConversionError(
            f"config.json: partial_rotary_factor={short(partial)} is not supported yet by this family"
        )
    if kind == "default":
        return theta, None
    left_out = ("rope_theta", "type", "partial_rotary_factor")
    found = {"rope_type": kind, **{key: value for key, value in given.items() if key not in left_out}}
    before = "original_max_position_embeddings"
    if kind in ("llama3", "yarn", "longrope") and config.get(before) is not None:
        found[before] = size(config, before)  # beside the rope's own it counts, as in transformers
    return theta, found


def experts_of(config: Config, *names: str) -> tuple[int, int]:
    """Number of experts, under the first of its spellings that is set, and how many of them a token uses."""
    experts, topk = size(config, *names), size(config, "num_experts_per_tok")
    if topk > experts:
        raise ConversionError(f"config.json: num_experts_per_tok={topk} must be at most {names[0]}={experts}")
    return experts, topk


def count(config: Config, *names: str) -> int:
    """A whole number, 0 when none of its spellings is set."""
    value = next((config[name] for name in names if config.get(name) is not None), 0)
    return 0 if value == 0 else size({names[0]: value}, names[0])


def leading_dense_layers(config: Config, *, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: from `first_k_dense_replace` on, every `moe_layer_freq`th."""
    dense, step = count(config, "first_k_dense_replace"), size(config, "moe_layer_freq", default=1)
    return tuple(layer >= dense and layer % step == 0 for layer in range(layers))


def sparse_layers(config: Config, *, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`th, those in `mlp_only_layers` never."""
    step = size(config, "decoder_sparse_step", default=1)
    dense = [] if config.get("mlp_only_layers") is None else config["mlp_only_layers"]
    if not isinstance(dense, list) or any(not isinstance(layer, int) for layer in dense):
        raise ConversionError(f"config.json: mlp_only_layers={short(dense)} must be a list of layer numbers")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def layer_types(config: Config) -> list[str] | None:
    """The kind of each layer's attention, if config.json gives it."""
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ConversionError(f"config.json: layer_types={short(kinds)} must be a list of names")
    return kinds


TOKENS = "ForTokenClassification"
"""How transformers' classes are named whose head scores each token."""


def _head_bias(config: Config) -> bool:
    scores_tokens = architecture(config, default="").endswith(TOKENS)
    return scores_tokens and switch(config, "token_classification_bias", default=True)


def _num_labels(config: Config) -> int | None:
    """Outputs of the score head of a class that has one, 0 for one that ends with hidden states; transformers leaves
    the default, 2, out of config.json."""
    if architecture(config, default="").endswith("Model"):
        return 0
    if not architecture(config, default="").endswith(("ForSequenceClassification", TOKENS)):
        return None
    labels = config.get("id2label")
    if not isinstance(labels, Mapping | None):
        raise ConversionError(f"config.json: id2label={short(labels)} must map numbers to labels")
    return len(labels) if labels else size(config, "num_labels", default=2)


def require_finite(config: Config) -> None:
    """Raises: ConversionError naming an infinity or NaN, also in lists and objects: Python reads them, but JSON has
    none, so run.json cannot hold such a config.json."""
    todo: list[tuple[str, Any]] = list(config.items())
    for name, value in todo:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"config.json: {name}={value} is no number in JSON; correct it there")
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        todo += [(f"{name}.{key}", item) for key, item in inner]


_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(
        ("initializer_range", "rms_norm_eps", "router_aux_loss_coef", "router_jitter_noise"),
        ((float,), "a decimal number"),
    ),
    "attention_dropout": ((float, int), "a number"),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "output_router_logits"), ((bool,), "true or false")),
    **dict.fromkeys(("attention_bias", "norm_topk_prob", "use_sliding_window"), ((bool,), "true or false")),
    "decoder_sparse_step": ((int,), "a number of layers"),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ((int, type(None)), "a token's number or null")),
    "eos_token_id": ((int, list, type(None)), "a token's number, a list of them or null"),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ((dict, type(None)), "an object or null")),
}
"""Types that transformers 5 insists on where it reads a config.json, of keys that the shape does not say or that have
a default here."""


def require_loadable(config: Config, *, model_type: str) -> None:
    """Of a config.json that a run's exports will carry: that transformers can load it.

    Raises: ConversionError naming a key whose type transformers refuses, or another model type than the family's.
    """
    for name, (types, words) in _TYPES.items():
        if name in config and type(config[name]) not in types:
            raise ConversionError(
                f"config.json: {name}={short(config[name])} must be {words}, or transformers cannot load the model"
            )
    for reason in _contradictions(config):
        raise ConversionError(f"config.json: {reason}, or transformers cannot load the model")
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(padding) is int and type(rows) is int and padding >= rows:
        raise ConversionError(
            f"config.json: pad_token_id={short(padding)} must be below vocab_size={short(rows)}, or transformers "
            "cannot load the model"
        )
    if (stated := config.get("model_type")) != model_type:
        raise ConversionError(
            f"config.json: model_type={short(stated)} must be {model_type!r}, or transformers cannot load the model; "
            "correct it"
        )


def _contradictions(config: Config) -> Iterator[str]:
    kinds, layers = layer_types(config), config.get("num_hidden_layers")
    if kinds is not None and len(kinds) != layers:
        yield f"layer_types has {len(kinds)} entries for {short(layers)} layers; it must have one for each"
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(name) and config[name].get("rope_theta", 0) is None:
            yield f"rope_theta=null in {name} must be a number"
    both = [config[name] for name in ("num_experts", "num_local_experts") if name in config]
    if len(both) == 2 and both[0] != both[1]:
        yield f"num_experts={short(both[0])} and num_local_experts={short(both[1])} must be the same number"


def refuse_quantised(config: Config) -> None:
    """Refuses a config.json of quantised weights; callers that dequantise remove `quantization_config` first."""
    given = config.get("quantization_config")
    if given:
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        raise ConversionError(
            f"config.json: quantization_config is set ({method}); quantised checkpoints are not supported here, "
            "use the unquantised checkpoint"
        )


def switched_window(config: Config) -> int | None:
    """`sliding_window` if `use_sliding_window` is on, as in Qwen's families."""
    on = switch(config, "use_sliding_window") and config.get("sliding_window") is not None
    return size(config, "sliding_window") if on else None


def refuse_windows(config: Config) -> None:
    """Refuses the switch of Qwen's families in one whose class in transformers has no windows, whatever it says."""
    if (window := switched_window(config)) is not None:
        raise ConversionError(
            f"config.json: use_sliding_window=true with sliding_window={window} is not supported by this family: "
            "transformers lets every layer see all tokens there; set it to false"
        )


def windows_by_layer(config: Config) -> dict[str, Any]:
    """`sliding_window` and `window_layers` of Qwen's dense families.

    A layer has the window if `layer_types` says so, or else from `max_window_layers` on.
    """
    window = switched_window(config)
    if window is None:
        return {}
    layers = size(config, "num_hidden_layers")
    kinds, first = layer_types(config), config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ConversionError(f"config.json: max_window_layers={short(first)} must be a number of layers")
    if kinds is not None and len(kinds) != layers:
        raise ConversionError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    windowed = tuple(kind == "sliding_attention" for kind in kinds or ()) or tuple(i >= first for i in range(layers))
    if not any(windowed):
        return {"sliding_window": None}
    return {"sliding_window": window, "window_layers": () if all(windowed) else windowed}


def window_config(shape: ModelShape) -> dict[str, Any]:
    """The keys that `windows_by_layer` reads, and those of a family whose layers all have the window."""
    if shape.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    windowed = shape.window_layers or (True,) * shape.num_layers
    kinds = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]
    return {
        "use_sliding_window": True,
        "sliding_window": shape.sliding_window,
        "max_window_layers": windowed.index(True),
        "layer_types": kinds,
    }


def refuse_unsupported(config: Config) -> None:
    """Refuses, by name, settings that change the model's numbers and that `ModelShape` cannot express."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConversionError(
            f"config.json: hidden_act={short(activation)} is not supported by this family; it uses silu"
        )
    if not switch(config, "is_causal", default=True):
        raise ConversionError(
            "config.json: is_causal=false is not supported by this family: each token would see those after it"
        )
    known = ["full_attention", *(["sliding_attention"] if switched_window(config) else [])]
    if odd := sorted({*(layer_types(config) or [])} - {*known}):
        raise ConversionError(f"config.json: layer_types has {', '.join(odd)}; here it may have {' and '.join(known)}")


def refuse_biases(config: Config, *names: str) -> None:
    """Refuses, by name, biases that a family's table has no rows for."""
    for name in names:
        if switch(config, name):
            raise ConversionError(f"config.json: {name}=true is not supported by this family's table")


def decoder(
    config: Config,
    *,
    model_type: str,
    default_architecture: str,
    head_dim: int | None,
    theta: float = 10000.0,
    epsilon: float = 1e-6,
    tied: bool = False,
    tensors_only: bool = False,
) -> dict[str, Any]:
    """The fields of `ModelShape` that all families here read in the same way.

    Args:
        head_dim: what transformers uses for this family when config.json has none; None: hidden size / heads.
        theta, epsilon, tied: what it uses for the base of the rotary embedding, the norms' epsilon and tied
            embeddings.
        tensors_only: leaves settings that change the model's numbers but not its tensors (activation, rotary
            embedding, windows) in config.json, unread.
    """
    refuse_quantised(config)
    if not tensors_only:
        refuse_unsupported(config)
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    groups = size(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise ConversionError(f"config.json: num_key_value_heads={groups} must divide num_attention_heads={heads}")
    head = size(config, "head_dim", default=head_dim or hidden // heads)
    base, scaling = (theta, None) if tensors_only else rope(config, default_theta=theta)
    return {
        "architecture": architecture(config, default=default_architecture),
        "model_type": model_type,
        "num_layers": size(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": size(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head,
        "vocab_size": size(config, "vocab_size"),
        "max_position_embeddings": size(config, "max_position_embeddings"),
        "untie_embeddings_and_output_weights": not switch(config, "tie_word_embeddings", default=tied),
        "norm_epsilon": number(config, "rms_norm_eps", default=epsilon),
        "rotary_base": base,
        "rope_scaling": scaling,
        "sliding_window": None,
        "num_labels": _num_labels(config),
        "head_bias": _head_bias(config),
        "hf_config": dict(config),
    }


def with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config.json, also one of a multimodal model, for an embedding of so many rows."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return {**config, "vocab_size": rows}
    outer = {"vocab_size": rows} if "vocab_size" in config else {}
    return {**config, **outer, "text_config": {**nested, "vocab_size": rows}}


def decoder_config(shape: ModelShape, *, dtype: str, **token_ids: int | None) -> dict[str, Any]:
    """The keys of config.json that every family here writes in the same way.

    `rope_theta`, `rope_scaling` and `torch_dtype` are the spellings that both transformers 4 and 5 read.
    """
    return {
        # a declared shape has no class name yet: reading this config.json gives it the family's
        "architectures": [shape.architecture] if shape.architecture else [],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "rope_scaling": dict(shape.rope_scaling) if shape.rope_scaling else None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        **{name: value for name, value in token_ids.items() if value is not None},
    }
