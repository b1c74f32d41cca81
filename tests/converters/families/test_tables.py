"""Every family's table against a model that transformers saved: a bijection, shards by hand, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import by_hand
import numpy as np
import pytest
from cases import CASES
from safetensors.numpy import load_file, save_file

from megabatch.converters.families import FAMILIES, family_of
from megabatch.converters.family import Family
from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.mapping import Mapped
from megabatch.converters.safetensors_io import HfFolder, Writer
from megabatch.converters.shards import assemble, read_shard, shard_shape
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

Saved = Callable[[str], Path]


def opened(folder: Path) -> tuple[Family, ModelShape, HfFolder]:
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    source = HfFolder(folder)
    return family, family.present(family.shape(config), source.names), source


def padded(mapped: Mapped) -> int | None:
    return by_hand.PADDED_VOCAB if mapped.split == "vocab" else None


def test_every_tensor_that_transformers_saves_is_in_the_table(case: str, saved: Saved) -> None:
    family, shape, folder = opened(saved(case))
    checked = family.check(shape, folder.tensors)
    aside = {*checked.carried, *family.copies(shape)}
    left = {name: info.shape for name, info in folder.tensors.items() if name not in aside}
    assert family.hf_tensors(shape) == left
    assert checked.duplicates == family.copies(shape)
    assert checked.ignored.keys() == checked.duplicates.keys()
    expected = CASES[case].expected(load_file(saved(case) / "model.safetensors"), shape)
    assert {(mapped.name, mapped.expert) for mapped in checked.tensors} == set(expected)


@pytest.mark.parametrize("tp", [1, 2])
def test_shards_equal_plain_numpy_and_go_back_bit_by_bit(case: str, tp: int, saved: Saved, tmp_path: Path) -> None:
    family, shape, folder = opened(saved(case))
    reference = load_file(saved(case) / "model.safetensors")
    expected = CASES[case].expected(reference, shape)
    checked = family.check(shape, folder.tensors)
    aside = {*checked.carried, *checked.duplicates}
    entries = {name: info for name, info in folder.tensors.items() if name not in aside}
    with Writer(tmp_path / "model.safetensors", entries) as writer:
        for mapped in (mapped for mapped in checked.tensors if not mapped.offset):
            vocab = padded(mapped)
            shards = [read_shard(folder, mapped, tp_rank=r, tp_size=tp, padded_vocab=vocab) for r in range(tp)]
            for rank, shard in enumerate(shards):
                by_table = np.frombuffer(shard, np.float32)
                by_table = by_table.reshape(shard_shape(mapped, tp_size=tp, padded_vocab=vocab))
                np.testing.assert_array_equal(by_table, expected[mapped.name, mapped.expert].shard(rank, tp))
            for rows in assemble(mapped, shards, itemsize=4, padded_vocab=vocab):
                writer.write(rows.hf, rows.data, row_start=rows.row_start, index=rows.index)
        for mapped in (mapped for mapped in checked.tensors if mapped.offset):
            _offset(mapped, folder, expected[mapped.name, mapped.expert].parts[0], reference, writer)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == entries.keys()
    assert all(back[name].tobytes() == reference[name].tobytes() for name in back)


def _offset(mapped: Mapped, folder: HfFolder, expected: np.ndarray, reference: by_hand.Arrays, writer: Writer) -> None:
    """A tensor that is computed, not moved: nothing moves it by mistake."""
    with pytest.raises(ConversionError, match=r"differs from .* by -1: its bytes cannot be moved"):
        read_shard(folder, mapped, tp_rank=0, tp_size=1)
    with pytest.raises(ConversionError, match="cannot be moved"):
        list(assemble(mapped, [expected.tobytes()], itemsize=4))
    (piece,) = mapped.pieces
    np.testing.assert_array_equal(reference[piece.hf] + np.float32(mapped.offset), expected)
    writer.write(piece.hf, memoryview(reference[piece.hf].tobytes()))


def test_each_left_out_tensor_fails_by_name(case: str, saved: Saved) -> None:
    family, shape, folder = opened(saved(case))
    needed = [name for name in folder.names if name in family.hf_tensors(shape)]
    for name in needed[:: max(1, len(needed) // 12)]:
        tensors = folder.tensors
        del tensors[name]
        with pytest.raises(ConversionError, match=f"{name} .* is missing"):
            family.check(shape, tensors)


@pytest.mark.parametrize("case", [name for name, made in CASES.items() if made.prefix in ("Mistral", "Mixtral")])
def test_config_written_for_a_shape_is_the_same_model_to_transformers(case: str, saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, shape, folder = opened(saved(case))
    (tmp_path / "config.json").write_text(json.dumps(family.hf_config(shape, dtype="float32", eos_token_id=3)))
    read = AutoConfig.from_pretrained(tmp_path)
    again = family.shape(json.loads(read.to_json_string(use_diff=False)))
    for name in (name for name in shape.__slots__ if name != "hf_config"):
        assert getattr(again, name) == getattr(shape, name), name
    (tmp_path / "model.safetensors").symlink_to(folder.path / "model.safetensors")
    info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not any(info.values()), info


@pytest.mark.parametrize("case", [name for name, made in CASES.items() if made.fused])
def test_folders_with_fused_experts_give_the_same_shards(case: str, saved: Saved, tmp_path: Path) -> None:
    """As transformers has them in memory, and saves them when told not to go back to the published names."""
    from transformers import AutoModelForCausalLM

    family, shape, plain = opened(saved(case))
    model = AutoModelForCausalLM.from_pretrained(saved(case))
    model.save_pretrained(tmp_path, save_original_format=False)
    _, _, fused = opened(tmp_path)
    assert family.expert_layout(fused.tensors, shape) == "fused"
    tables = [family.check(shape, source.tensors).tensors for source in (plain, fused)]
    for a, b in zip(*tables, strict=True):
        assert (a.name, a.expert, a.shape) == (b.name, b.expert, b.shape)
        if not a.offset:
            shards = [read_shard(source, m, tp_rank=1, tp_size=2, padded_vocab=padded(a)) for source, m in
                      ((plain, a), (fused, b))]  # fmt: skip
            assert shards[0] == shards[1], a.name


def test_layers_of_multi_token_prediction_are_taken_whole_or_not_at_all(saved: Saved) -> None:
    config = json.loads((saved("deepseek-v3") / "config.json").read_text())
    family = family_of(config)
    shape = family.shape(config)
    assert shape.mtp_num_layers == 1, "transformers writes the number and leaves the layer out"
    names = HfFolder(saved("deepseek-v3")).names
    assert family.present(shape, names).mtp_num_layers is None
    assert family.present(shape, [*names, "model.layers.2.enorm.weight"]) == shape
    assert family.present(shape, ["decoder.layers.0.x"], mtp="mtp.").mtp_num_layers is None
    assert family.present(shape, ["mtp.layers.0.enorm.weight"], mtp="mtp.") == shape
    family, shape, folder = opened(saved("deepseek-v3-mtp"))
    tensors = folder.tensors
    del tensors["model.layers.3.eh_proj.weight"]
    with pytest.raises(ConversionError, match=r"model.layers.3.eh_proj.weight \[24, 48\] is missing"):
        family.check(shape, tensors)
    tensors = folder.tensors
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.norm.weight"]
    with pytest.raises(ConversionError, match=r"model.layers.3.embed_tokens.weight .* is left over"):
        family.check(shape, tensors)


def test_embeddings_that_multi_token_prediction_does_not_share_are_refused(saved: Saved, tmp_path: Path) -> None:
    arrays = load_file(saved("deepseek-v3-mtp") / "model.safetensors")
    name = "model.layers.3.shared_head.head.weight"
    save_file(arrays | {name: arrays[name] + 1}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(saved("deepseek-v3-mtp") / "config.json")
    with pytest.raises(ConversionError, match=f"{name} differs from lm_head.weight, which a multi-token"):
        open_hf_model(tmp_path)


def test_expert_biases_are_float32_to_megatron_core(saved: Saved) -> None:
    family, shape, _ = opened(saved("deepseek-v3-mtp"))
    biases = [mapped for mapped in family.tensors(shape) if mapped.name.endswith("router.expert_bias")]
    assert {mapped.dtype for mapped in biases} == {"F32"} and len(biases) == 3
    assert not any(mapped.dtype for mapped in family.tensors(shape) if mapped not in biases)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config is set \(mxfp4\)"),
        ("gemma3-vision", {"quantization_config": {"quant_method": "bnb"}}, r"quantization_config is set \(bnb\)"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("deepseek-v2", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be at most n_routed_experts=4"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be a positive whole number"),
        ("glm4-moe", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one' must be a positive"),
        ("qwen3-next", {"layer_types": ["linear_attention"]}, "layer_types has 1 entries; .* each of 4 layers"),
        ("qwen3-next", {"layer_types": ["mamba"] * 4}, "layer_types has 4 entries, also mamba"),
        ("qwen3-next", {"linear_num_key_heads": 4}, "linear_num_key_heads=4 must divide linear_num_value_heads=6"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be a positive"),
    ],
)
def test_what_a_family_cannot_read_is_named(case: str, changes: dict[str, object], message: str, saved: Saved) -> None:
    config = json.loads((saved(case) / "config.json").read_text())
    with pytest.raises(ConversionError, match=message):
        family_of(config).shape(config | changes)


def test_older_spellings_are_the_same_shape(saved: Saved) -> None:
    """As configs were written before transformers 5."""
    for case, renames in {
        "deepseek-v3": {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"},
        "mixtral": {"num_local_experts": "num_experts"},
        "glm4-moe": {"n_routed_experts": "num_experts"},
    }.items():
        config = json.loads((saved(case) / "config.json").read_text())
        family = family_of(config)
        other = {renames.get(name, name): value for name, value in config.items()}
        other["rope_theta"] = other.pop("rope_parameters")["rope_theta"]
        a, b = family.shape(config), family.shape(other)
        for name in (name for name in a.__slots__ if name != "hf_config"):
            assert getattr(a, name) == getattr(b, name), (case, name)
    next_config = json.loads((saved("qwen3-next") / "config.json").read_text())
    del next_config["layer_types"]
    assert family_of(next_config).shape(next_config).linear_attention_layers == (True, True, True, False)
    flat = json.loads((saved("qwen2-vl") / "config.json").read_text())
    flat |= flat.pop("text_config") | {"architectures": flat["architectures"]}
    assert family_of(flat).shape(flat).hidden_size == 60


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("Gemma3", {"hidden_size": 2560, "num_hidden_layers": 34}),
        ("Llava", {"model_type": "llama", "vocab_size": 32064}),
        ("Mistral3", {"model_type": "mistral", "num_hidden_layers": 40}),
    ],
)
def test_a_sparse_text_config_means_what_transformers_takes_it_for(model: str, text: dict[str, object]) -> None:
    import transformers

    config = {"architectures": [f"{model}ForConditionalGeneration"], "text_config": text}
    shape = family_of(config).shape(config)
    theirs = getattr(transformers, f"{model}Config")(text_config=text).text_config
    for ours, name in {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads", "kv_channels": "head_dim",
        "num_query_groups": "num_key_value_heads", "norm_epsilon": "rms_norm_eps",
        "max_position_embeddings": "max_position_embeddings",
    }.items():  # fmt: skip
        assert getattr(shape, ours) == getattr(theirs, name), name


def test_models_of_deepseeks_architecture_need_no_entry_of_their_own() -> None:
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}
    assert family_of(config) is FAMILIES["deepseek_v3"]


def test_every_family_has_a_case(saved: Saved) -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "qwen3_moe"}
    covered = {family_of(json.loads((saved(name) / "config.json").read_text())).name for name in CASES}
    assert covered | elsewhere == set(FAMILIES)
