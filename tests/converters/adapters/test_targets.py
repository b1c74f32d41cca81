"""Names of layers that get adapters, in both spellings, and the adapters' tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megabatch.converters.adapters.targets import Target, find_targets, find_whole, table_of
from megabatch.converters.families import family_named
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConversionError

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 20,
    "max_position_embeddings": 32, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 6,
    "mlp_only_layers": [1], "decoder_sparse_step": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "norm_topk_prob": True,
}  # fmt: skip
RANK = 3


@pytest.fixture(scope="module")
def table() -> list[Mapped]:
    family = family_named("qwen3_moe")
    return family.tensors(family.shape(CONFIG))


def _found(table: list[Mapped], *names: str, regex: str | None = None) -> dict[tuple[str, int | None], Target]:
    targets = find_targets(table, names, regex=regex, rank=RANK)
    return {(target.weight.name, target.weight.expert): target for target in targets}


def test_all_of_a_kind(table: list[Mapped]) -> None:
    linear = _found(table, "all-linear")
    leaves = {name.removesuffix(".weight").rpartition(".")[2] for name, _ in linear}
    assert leaves == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert len(linear) == 2 * 2 + 2 + 2 * 2, "attention of two layers, a dense MLP, two experts"
    assert {name for name, _ in _found(table, "all-router")} == {"decoder.layers.0.mlp.router.weight"}
    assert {name for name, _ in _found(table, "all-embedding")} == {"embedding.word_embeddings.weight"}


def test_names_of_both_spellings(table: list[Mapped]) -> None:
    assert _found(table, "linear_qkv").keys() == _found(table, "q_proj", "k_proj", "v_proj").keys()
    assert _found(table, "linear_proj") == _found(table, "o_proj")
    (first,) = {target.parts for target in _found(table, "v_proj", "q_proj", regex=None).values() if "layers.0" in
                target.weight.name}  # fmt: skip
    assert first == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    assert _found(table, "layers.1.mlp.down_proj").keys() == {("decoder.layers.1.mlp.linear_fc2.weight", None)}
    pattern = r"decoder\.layers\.0\..*\.linear_fc1|.*layers\.1.*up_proj"
    assert [target.parts for target in _found(table, regex=pattern).values()] == [
        ("model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.0.up_proj"),
        ("model.layers.0.mlp.experts.1.gate_proj", "model.layers.0.mlp.experts.1.up_proj"),
        ("model.layers.1.mlp.up_proj",),
    ]


def test_the_tensors_of_a_fused_layer(table: list[Mapped]) -> None:
    """Two groups of two query heads, a key and a value head of four rows each; query and value are adapted."""
    target = _found(table, "q_proj", "v_proj")["decoder.layers.0.self_attention.linear_qkv.weight", None]
    a, b = table_of([target])
    assert (a.name, a.shape, a.split) == (
        "decoder.layers.0.self_attention.linear_qkv.lora_A.weight",
        (6, 8),
        "replicated",
    )
    assert (b.name, b.shape, b.split) == (
        "decoder.layers.0.self_attention.linear_qkv.lora_B.weight",
        (24, 3),
        "column",
    )
    of = "base_model.model.model.layers.0.self_attn."
    assert [(piece.hf.removeprefix(of), piece.rows) for piece in a.pieces] == [
        ("q_proj.lora_A.weight", (0, 3)), ("v_proj.lora_A.weight", (0, 3)),
    ]  # fmt: skip
    assert [(piece.hf.removeprefix(of), piece.rows) for piece in b.pieces] == [
        ("q_proj.lora_B.weight", (0, 8)), ("v_proj.lora_B.weight", (0, 4)),
        ("q_proj.lora_B.weight", (8, 16)), ("v_proj.lora_B.weight", (4, 8)),
    ]  # fmt: skip
    assert target.peft_shapes() == {
        f"{of}q_proj.lora_A.weight": (3, 8), f"{of}v_proj.lora_A.weight": (3, 8),
        f"{of}q_proj.lora_B.weight": (16, 3), f"{of}v_proj.lora_B.weight": (8, 3),
    }  # fmt: skip


def test_a_row_split_and_an_embedding(table: list[Mapped]) -> None:
    down = _found(table, "down_proj")["decoder.layers.0.mlp.experts.linear_fc2.weight", 1]
    assert (down.a.shape, down.a.split, down.a.expert) == ((3, 6), "row", 1)
    assert (down.b.shape, down.b.split) == ((8, 3), "replicated")
    (embedding,) = _found(table, "embed_tokens").values()
    assert (embedding.a.name, embedding.a.shape, embedding.a.split) == (
        "embedding.word_embeddings.lora_embedding_A", (20, 3), "vocab")  # fmt: skip
    assert (embedding.b.shape, embedding.b.split) == ((8, 3), "replicated")


@pytest.mark.parametrize(
    ("names", "regex", "message"),
    [
        (["linear_qvk"], None, "'linear_qvk' is the end of no layer's name; the nearest are linear_qkv"),
        (["all-linear", "qproj"], None, "'qproj' is the end of no layer's name; the nearest are q_proj"),
        (["xyz"], None, "there are all-linear, all-router, all-embedding, word_embeddings"),
        (["q_proj", "gate_proj"], None, "model.layers.0.mlp.experts.0.up_proj: of a layer's experts all parts get an"),
        ([], r".*experts\.1\..*", "model.layers.0.mlp.experts.0.gate_proj: of a layer's experts all parts get an"),
        ([], r".*conv.*", "'.*conv.*' matches no layer; layers are called decoder.layers."),
        ([], "(", "'(' is not a regular expression"),
    ],
)
def test_names_of_no_layer(table: list[Mapped], names: list[str], regex: str | None, message: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        find_targets(table, names, regex=regex, rank=RANK)


def test_what_is_trained_in_full_besides(table: list[Mapped]) -> None:
    assert find_whole(table, ["lm_head", "word_embeddings"], biases=True) == {
        "output_layer.weight", "embedding.word_embeddings.weight"}  # fmt: skip
    assert find_whole(table, ["layers.1.self_attn.q_norm"], biases=False) == {
        "decoder.layers.1.self_attention.q_layernorm.weight"}  # fmt: skip
    with pytest.raises(ConversionError, match="'lm_haed' is the end of no layer's name"):
        find_whole(table, ["lm_haed"], biases=False)
