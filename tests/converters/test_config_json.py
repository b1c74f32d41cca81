"""config.json in its old and new spellings, and what is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megabatch.converters.families import family_named
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def shape(model_type: str, **changes: object) -> ModelShape:
    config = {**BASE, **(MOE if model_type == "qwen3_moe" else {}), **changes}
    return family_named(model_type).shape({name: value for name, value in config.items() if value is not ...})


def test_defaults_are_those_of_transformers() -> None:
    llama = shape("llama", num_key_value_heads=...)
    assert (llama.num_query_groups, llama.kv_channels) == (8, 8)
    assert llama.untie_embeddings_and_output_weights
    assert (llama.norm_epsilon, llama.rotary_base, llama.rope_scaling) == (1e-6, 10000.0, None)
    assert shape("mistral", max_position_embeddings=8192).sliding_window == 4096
    assert shape("mistral", max_position_embeddings=8192, sliding_window=None).sliding_window is None
    assert shape("mixtral", max_position_embeddings=8192, **_EXPERTS).sliding_window is None
    assert shape("qwen3").kv_channels == 128
    assert shape("qwen3", head_dim=None).kv_channels == 128
    assert shape("qwen3_moe").kv_channels == 8
    assert shape("qwen3_moe").moe_router_pre_softmax


@pytest.mark.parametrize(
    ("spelling", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5,
         {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}}, 5e5,
         {"rope_type": "yarn", "factor": 4.0}),
        ({"rope_theta": 7, "rope_scaling": None, "rope_parameters": None}, 7.0, None),
    ],
)  # fmt: skip
def test_rope_spellings(spelling: dict[str, Any], theta: float, scaling: dict[str, Any] | None) -> None:
    read = shape("llama", **spelling)
    assert (read.rotary_base, read.rope_scaling) == (theta, scaling)


def test_expert_spellings_and_layers() -> None:
    assert shape("qwen3_moe", num_experts=..., num_local_experts=16).num_experts == 16
    assert shape("qwen3_moe").moe_layers == (True,) * 4
    assert shape("qwen3_moe", decoder_sparse_step=2).moe_layers == (False, True, False, True)
    assert shape("qwen3_moe", mlp_only_layers=[0, 3]).moe_layers == (False, True, True, False)
    assert not shape("qwen3_moe", norm_topk_prob=True).moe_router_pre_softmax


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size='64' must be a positive whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by layer type"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ("qwen3_moe", {"num_experts": ...}, "num_experts is missing"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be at most num_experts=8"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers='all'"),
    ],
)
def test_refused_by_name(model_type: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        shape(model_type, **change)


def test_hub_configs_that_name_an_unused_window_are_read() -> None:
    """Qwen2.5 on the hub: a window beside `use_sliding_window: false`."""
    unused = shape("qwen2", use_sliding_window=False, sliding_window=131072, max_window_layers=28)
    assert unused.add_qkv_bias and unused.sliding_window is None


def test_a_window_that_is_switched_on_is_read() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    given = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2, "layer_types": kinds}
    for model_type in ("qwen2", "qwen3", "qwen3_moe"):
        assert shape(model_type, **given).sliding_window == 32
    assert shape("qwen2", **given).window_layers == (False, False, True, True)
    assert shape("qwen3_moe", **given).window_layers == (), "transformers' class has the window in every layer"
    by_number = {name: value for name, value in given.items() if name != "layer_types"}
    assert shape("qwen3", **by_number).window_layers == (False, False, True, True)
    assert shape("qwen3", **by_number | {"max_window_layers": 0}).window_layers == ()
    assert shape("qwen3", **by_number | {"max_window_layers": 4}).sliding_window is None


@pytest.mark.parametrize(
    "older", [{"rope_type": "linear", "factor": 2.0}, {"rope_theta": 5e5}, {"rope_type": "default"}]
)
def test_two_rotary_embeddings_that_differ_are_refused(older: dict[str, Any]) -> None:
    """transformers would read `rope_scaling`, with its own base or the default."""
    newer = {"rope_theta": 1e6, "rope_type": "default"}
    with pytest.raises(ConversionError, match="rope_scaling and rope_parameters differ"):
        shape("qwen3", rope_parameters=newer, rope_scaling=older)
    same = shape("qwen3", rope_parameters=newer, rope_scaling=older | newer | {"factor": 2.0})
    assert (same.rotary_base, same.rope_scaling) == (1e6, None)


def test_a_mistral_with_a_kind_for_each_layer_is_refused() -> None:
    kinds = ["full_attention"] * 4
    with pytest.raises(ConversionError, match="layer_types beside sliding_window=16 is not supported"):
        shape("mistral", sliding_window=16, layer_types=kinds)
    assert shape("mistral", sliding_window=None, layer_types=kinds).sliding_window is None


def test_windows_of_another_family_are_refused() -> None:
    """transformers' Llama has none, whatever its config.json says."""
    with pytest.raises(ConversionError, match="use_sliding_window=true with sliding_window=16 is not supported"):
        shape("llama", use_sliding_window=True, sliding_window=16)
    for unused in ({"use_sliding_window": False, "sliding_window": 16}, {"use_sliding_window": True}):
        assert shape("llama", **unused).sliding_window is None


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
@pytest.mark.parametrize("beside", [None, 64])
def test_the_length_before_stretching_is_the_one_that_transformers_takes(kind: str, beside: int | None) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    given = {"rope_scaling": scaling, "original_max_position_embeddings": beside, "max_position_embeddings": 256}
    given = {name: value for name, value in given.items() if value is not None}
    theirs = AutoConfig.for_model("llama", **copy.deepcopy(given))
    LlamaRotaryEmbedding(theirs)  # the model settles which of the two counts, not its config
    found = shape("llama", **given).rope_scaling
    assert found is not None
    length = "original_max_position_embeddings"
    assert found[length] == theirs.rope_parameters[length]
