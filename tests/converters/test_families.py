"""Tables against models that transformers saved: bijection, brute-force shards, and the way back, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megabatch.converters.families import FAMILIES, family_of
from megabatch.converters.family import Family
from megabatch.converters.mapping import ExpertLayout, Mapped
from megabatch.converters.safetensors_io import HfFolder, Writer
from megabatch.converters.shards import assemble, read_shard, shard_shape
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

PADDED_VOCAB = 64
Arrays = dict[str, np.ndarray]
Saved = Callable[[str], Path]


def opened(folder: Path) -> tuple[Family, ModelShape, HfFolder]:
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    return family, family.shape(config), HfFolder(folder)


def by_hand(hf: Arrays, shape: ModelShape) -> dict[tuple[str, int | None], list[np.ndarray]]:
    """megatron-core's tensors from Hugging Face's by plain reshapes; a list has the parts that a column split cuts."""
    groups, head = shape.num_query_groups, shape.kv_channels
    out: dict[tuple[str, int | None], list[np.ndarray]] = {
        ("embedding.word_embeddings.weight", None): [hf["model.embed_tokens.weight"]],
        ("decoder.final_layernorm.weight", None): [hf["model.norm.weight"]],
    }
    if "lm_head.weight" in hf:
        out["output_layer.weight", None] = [hf["lm_head.weight"]]
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = ours + "self_attention."
        out[attention + "linear_qkv.layer_norm_weight", None] = [hf[theirs + "input_layernorm.weight"]]
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in hf:
                q, k, v = (hf[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv")
                tail = q.shape[1:]
                fused = np.concatenate([x.reshape(groups, -1, *tail) for x in (q, k, v)], axis=1)
                assert fused.shape[1] == (shape.num_attention_heads // groups + 2) * head
                out[f"{attention}linear_qkv.{kind}", None] = [fused.reshape(-1, *tail)]
            if f"{theirs}self_attn.o_proj.{kind}" in hf:
                out[f"{attention}linear_proj.{kind}", None] = [hf[f"{theirs}self_attn.o_proj.{kind}"]]
        for x in "qk":
            if f"{theirs}self_attn.{x}_norm.weight" in hf:
                out[f"{attention}{x}_layernorm.weight", None] = [hf[f"{theirs}self_attn.{x}_norm.weight"]]
        after = [hf[theirs + "post_attention_layernorm.weight"]]
        if theirs + "mlp.gate.weight" in hf:
            out[ours + "pre_mlp_layernorm.weight", None] = after
            out[ours + "mlp.router.weight", None] = [hf[theirs + "mlp.gate.weight"]]
            for e in range(shape.num_experts or 0):
                gate, up, down = (hf[f"{theirs}mlp.experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down"))
                out[ours + "mlp.experts.linear_fc1.weight", e] = [gate, up]
                out[ours + "mlp.experts.linear_fc2.weight", e] = [down]
            continue
        out[ours + "mlp.linear_fc1.layer_norm_weight", None] = after
        for kind in ("weight", "bias"):
            if f"{theirs}mlp.up_proj.{kind}" in hf:
                out[f"{ours}mlp.linear_fc1.{kind}", None] = [
                    hf[f"{theirs}mlp.{x}_proj.{kind}"] for x in ("gate", "up")
                ]
                out[f"{ours}mlp.linear_fc2.{kind}", None] = [hf[f"{theirs}mlp.down_proj.{kind}"]]
    return out


def cut_by_hand(name: str, parts: list[np.ndarray], *, rank: int, tp: int) -> np.ndarray:
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded = np.zeros((PADDED_VOCAB, parts[0].shape[1]), parts[0].dtype)
        padded[: len(parts[0])] = parts[0]
        return np.split(padded, tp)[rank]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")):
        return np.concatenate([np.split(part, tp)[rank] for part in parts])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return np.split(parts[0], tp, axis=1)[rank]
    return parts[0]


def padded(mapped: Mapped) -> int | None:
    return PADDED_VOCAB if mapped.split == "vocab" else None


def test_every_tensor_that_transformers_saves_is_in_the_table(case: str, saved: Saved) -> None:
    family, shape, folder = opened(saved(case))
    checked = family.check(shape, folder.tensors)
    assert family.hf_tensors(shape) == {name: info.shape for name, info in folder.tensors.items()}
    assert not checked.ignored
    assert {(mapped.name, mapped.expert) for mapped in checked.tensors} == set(by_hand(_loaded(saved(case)), shape))


def _loaded(folder: Path) -> Arrays:
    arrays: Arrays = load_file(folder / "model.safetensors")
    return arrays


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_equal_plain_reshapes_and_go_back_bit_by_bit(case: str, tp: int, saved: Saved, tmp_path: Path) -> None:
    family, shape, folder = opened(saved(case))
    reference = _loaded(saved(case))
    expected = by_hand(reference, shape)
    with Writer(tmp_path / "model.safetensors", folder.tensors) as writer:
        for mapped in family.tensors(shape):
            shards = [
                read_shard(folder, mapped, tp_rank=rank, tp_size=tp, padded_vocab=padded(mapped)) for rank in range(tp)
            ]
            for rank, shard in enumerate(shards):
                by_table = np.frombuffer(shard, np.float32).reshape(
                    shard_shape(mapped, tp_size=tp, padded_vocab=padded(mapped))
                )
                parts = expected[mapped.name, mapped.expert]
                np.testing.assert_array_equal(by_table, cut_by_hand(mapped.name, parts, rank=rank, tp=tp))
            for rows in assemble(mapped, shards, itemsize=4, padded_vocab=padded(mapped)):
                writer.write(rows.hf, rows.data, row_start=rows.row_start, index=rows.index)
    back = _loaded(tmp_path)
    assert back.keys() == reference.keys()
    assert all(back[name].tobytes() == reference[name].tobytes() for name in reference)


def fuse(arrays: Arrays, shape: ModelShape) -> Arrays:
    """Experts as transformers 5 holds them in memory."""
    out = {name: array for name, array in arrays.items() if ".mlp.experts." not in name}
    for layer in range(shape.num_layers):
        base = f"model.layers.{layer}.mlp.experts."
        if not shape.is_moe_layer(layer):
            continue
        experts = range(shape.num_experts or 0)
        out[base + "gate_up_proj"] = np.stack(
            [np.concatenate([arrays[f"{base}{e}.{x}_proj.weight"] for x in ("gate", "up")]) for e in experts]
        )
        out[base + "down_proj"] = np.stack([arrays[f"{base}{e}.down_proj.weight"] for e in experts])
    return out


@pytest.mark.parametrize("case", ["qwen3-moe", "qwen3-moe-mixed"])
def test_fused_experts_are_those_of_transformers_memory(case: str, saved: Saved) -> None:
    from transformers import AutoModelForCausalLM

    family, shape, _ = opened(saved(case))
    fused = fuse(_loaded(saved(case)), shape)
    state = AutoModelForCausalLM.from_pretrained(saved(case)).state_dict()
    for name, array in fused.items():
        np.testing.assert_array_equal(state[name].numpy(), array)
    assert family.hf_tensors(shape, experts="fused") == {name: array.shape for name, array in fused.items()}


@pytest.mark.parametrize("case", ["qwen3-moe", "qwen3-moe-mixed"])
@pytest.mark.parametrize("tp", [1, 2])
def test_fused_experts_give_the_same_shards_and_can_be_written(
    case: str, tp: int, saved: Saved, tmp_path: Path
) -> None:
    family, shape, plain = opened(saved(case))
    arrays = fuse(_loaded(saved(case)), shape)
    save_file(arrays, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    layouts: list[tuple[HfFolder, ExpertLayout]] = [(plain, "per_expert"), (folder, "fused")]
    tables = [family.check(shape, source.tensors).tensors for source, _ in layouts]
    out = tmp_path / "out.safetensors"
    with Writer(out, folder.tensors) as writer:
        for a, b in zip(*tables, strict=True):
            shards = [read_shard(folder, b, tp_rank=rank, tp_size=tp) for rank in range(tp)]
            assert shards == [read_shard(plain, a, tp_rank=rank, tp_size=tp) for rank in range(tp)]
            for rows in assemble(b, shards, itemsize=4):
                writer.write(rows.hf, rows.data, row_start=rows.row_start, index=rows.index)
    back = load_file(out)
    assert all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_tied_head_in_the_file_is_a_duplicate(saved: Saved) -> None:
    family, shape, folder = opened(saved("qwen2-tied"))
    tensors = folder.tensors | {"lm_head.weight": folder.info("model.embed_tokens.weight")}
    checked = family.check(shape, tensors)
    assert checked.duplicates == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in checked.ignored
    assert "lm_head.weight" not in family.hf_tensors(shape)


def test_old_rotary_buffers_are_ignored_with_a_reason(saved: Saved) -> None:
    family, shape, folder = opened(saved("llama"))
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    checked = family.check(shape, folder.tensors | {name: folder.info("model.norm.weight")})
    assert "config.json" in checked.ignored[name]


def test_faults_are_named_together(saved: Saved) -> None:
    family, shape, folder = opened(saved("qwen3-moe"))
    tensors = folder.tensors
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors["model.layers.1.mlp.experts.2.up.weight"] = tensors.pop(key)
    q = "model.layers.0.self_attn.q_proj.weight"
    tensors[q] = tensors[q]._replace(shape=(7, 24))
    v = "model.layers.0.self_attn.v_proj.weight"
    tensors[v] = tensors[v]._replace(dtype="BF16")
    router = "model.layers.1.mlp.gate.weight"
    tensors[router] = tensors[router]._replace(dtype="F8_E4M3")
    with pytest.raises(ConversionError) as caught:
        family.check(shape, tensors)
    text = str(caught.value)
    assert "5 faults" in text
    assert f"{key} [12, 24] is missing: GateUp(decoder.layers.{{l}}.mlp.experts.linear_fc1.weight <- " in text
    assert "model.layers.1.mlp.experts.2.up.weight [12, 24] F32 is left over" in text
    assert f"{q} has shape [7, 24] F32, config.json gives [24, 24]" in text
    assert f"{v} is BF16 and {q} is F32" in text
    assert f"{router} [4, 24] is F8_E4M3" in text


def test_each_left_out_tensor_fails_by_name(saved: Saved) -> None:
    family, shape, folder = opened(saved("llama-tied-biases"))
    for name in folder.names:
        tensors = folder.tensors
        del tensors[name]
        with pytest.raises(ConversionError, match=f"{name} .* is missing"):
            family.check(shape, tensors)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(
        ConversionError, match="Qwen3MoeForCasualLM is not supported; the nearest is Qwen3MoeForCausalLM"
    ):
        family_of({"architectures": ["Qwen3MoeForCasualLM"]})
    with pytest.raises(ConversionError, match="converters/families"):
        family_of({})
    assert family_of({"model_type": "qwen3"}) is FAMILIES["qwen3"]


@pytest.mark.parametrize(
    ("prefix", "alike"),
    [("Olmo2", "Llama"), ("Olmoe", "Mixtral"), ("Qwen2Moe", "Qwen3Moe"), ("Phi3", "Mistral"), ("Gemma2", "Gemma3")],
)
def test_an_unknown_family_names_the_one_that_is_built_most_alike(prefix: str, alike: str) -> None:
    """By what its config.json says, as transformers writes it, not by its name; and not all that are known."""
    import transformers

    config = getattr(transformers, f"{prefix}Config")().to_dict() | {"architectures": [f"{prefix}ForCausalLM"]}
    with pytest.raises(ConversionError, match=f"it is built most like {alike}ForCausalLM. docs/families.md") as error:
        family_of(config)
    assert len(str(error.value)) < 300


def test_what_is_built_like_nothing_names_nothing() -> None:
    with pytest.raises(ConversionError, match=r"architectures=MambaForCausalLM is not supported. docs/families.md"):
        family_of({"architectures": ["MambaForCausalLM"], "state_size": 16})


def test_config_written_for_a_shape_is_the_same_model_to_transformers(case: str, saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, shape, folder = opened(saved(case))
    config = family.hf_config(shape, dtype="float32", eos_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read: Any = AutoConfig.from_pretrained(tmp_path)
    assert read.eos_token_id == 3
    again = family.shape(json.loads(read.to_json_string(use_diff=False)))
    strip = {name: getattr(shape, name) for name in shape.__slots__ if name != "hf_config"}
    assert strip == {name: getattr(again, name) for name in again.__slots__ if name != "hf_config"}
    (tmp_path / "model.safetensors").symlink_to(folder.path / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype.is_floating_point
