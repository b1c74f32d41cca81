"""Names of parameters to freeze, in both spellings."""

from __future__ import annotations

import re

import pytest

from megabatch.converters.families import family_named
from megabatch.converters.frozen import Freezing, frozen_names
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape


@pytest.fixture(scope="module")
def table() -> list[Mapped]:
    shape = ModelShape(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=16,
        max_position_embeddings=32,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
        num_experts=2,
        moe_ffn_hidden_size=4,
        moe_router_topk=1,
        moe_layers=(True, True),
    )
    return family_named("qwen3_moe").tensors(shape)


LAYER = "decoder.layers.0."


def test_prefixes_of_both_spellings_mean_the_same(table: list[Mapped]) -> None:
    ours = frozen_names(table, Freezing(freeze_parameters=("embedding.", LAYER)))
    theirs = frozen_names(table, Freezing(freeze_parameters=("model.embed_tokens", "model.layers.0.")))
    assert ours == theirs
    assert {name for name in ours if not name.startswith(LAYER)} == {"embedding.word_embeddings.weight"}
    assert f"{LAYER}mlp.experts.linear_fc1.weight" in ours


def test_what_is_trained_all_the_same(table: list[Mapped]) -> None:
    frozen = frozen_names(
        table,
        Freezing(
            freeze_parameters_ratio=1.0,
            trainable_parameters=("output_layer.",),
            trainable_parameters_regex=r"q_layernorm|k_layernorm",
        ),
    )
    trained = {mapped.name for mapped in table} - frozen
    norms = {f"decoder.layers.{i}.self_attention.{x}_layernorm.weight" for i in (0, 1) for x in "qk"}
    assert trained == {"output_layer.weight", *norms}


def test_a_share_is_no_more_than_asked_for_and_from_the_input_on(table: list[Mapped]) -> None:
    sizes: dict[str, int] = {}
    for mapped in table:
        sizes[mapped.name] = sizes.get(mapped.name, 0) + mapped.shape[0] * (mapped.shape[1:] or (1,))[0]
    total, names = sum(sizes.values()), list(sizes)
    for ratio in (0.0, 0.1, 0.5, 0.9):
        frozen = frozen_names(table, Freezing(freeze_parameters_ratio=ratio))
        assert frozen == {*names[: len(frozen)]}
        taken = sum(sizes[name] for name in frozen)
        assert taken <= ratio * total < taken + sizes[names[len(frozen)]]


@pytest.mark.parametrize(
    ("freezing", "message"),
    [
        (Freezing(freeze_parameters=("decoder.layer.0",)),
         "freeze_parameters: no parameter's name begins with 'decoder.layer.0'; the nearest are decoder.layers.0."),
        (Freezing(freeze_parameters=("model.layers.0.self_attn.q_proj",)),
         "freeze_parameters: model.layers.0.self_attn.q_proj.weight is a part of "
         "decoder.layers.0.self_attention.linear_qkv.weight, with model.layers.0.self_attn.k_proj.weight, "
         "model.layers.0.self_attn.v_proj.weight; name all of them or none"),
        (Freezing(freeze_parameters=("model.layers.0.mlp.experts.1",)), "is a part of"),
        (Freezing(trainable_parameters_regex="lm_haed"), "trainable_parameters_regex: 'lm_haed' is found in no"),
        (Freezing(freeze_parameters_regex="("), "freeze_parameters_regex: '(' is no regular expression"),
        (Freezing(freeze_parameters_ratio=1.0), "freeze_parameters: nothing is left to train"),
    ],
)  # fmt: skip
def test_names_of_nothing_and_of_parts_are_refused(table: list[Mapped], freezing: Freezing, message: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        frozen_names(table, freezing)
