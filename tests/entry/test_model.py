"""Where the shape of a recipe's model is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Bridge, Model, MoE, Recipe
from megabatch.entry.input_checks import missing_inputs
from megabatch.entry.model import find_model


def _with(recipe: Recipe, name: str, *, use_hf: bool = True) -> Recipe:
    return replace(recipe, model=Model(model=name), bridge=Bridge(use_hf=use_hf))


def test_a_folder_says_its_own_shape(recipe: Recipe, model_folder: Path) -> None:
    found = find_model(recipe)
    assert found.folder == model_folder
    assert found.shape is not None and found.shape.hidden_size == 8 and found.shape.qk_layernorm


def test_a_hugging_face_cache_is_found_by_its_commit(recipe: Recipe, model_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "caches" / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc123").symlink_to(model_folder)
    found = find_model(_with(recipe, "org/tiny"))
    assert found.folder == repository / "snapshots" / "abc123" and found.shape is not None
    (repository / "refs" / "main").write_text("another")
    assert find_model(_with(recipe, "org/tiny")).shape is None


@pytest.mark.parametrize("layout", ["hub/models/org/ti___ny", "models/org/ti___ny", "hub/org/ti.ny"])
def test_modelscope_caches_of_all_versions(recipe: Recipe, model_folder: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "caches" / layout
    target.parent.mkdir(parents=True)
    target.symlink_to(model_folder)
    assert find_model(_with(recipe, "org/ti.ny", use_hf=False)).folder == target


def test_a_profiles_shared_cache_is_asked_instead(recipe: Recipe, model_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "shared" / "huggingface" / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(model_folder)
    assert find_model(_with(recipe, "org/tiny"), shared_cache=str(tmp_path / "shared")).folder is not None
    assert find_model(_with(recipe, "org/tiny")).folder is None


def test_a_known_model_is_planned_without_its_files(recipe: Recipe) -> None:
    found = find_model(_with(recipe, "Qwen/Qwen3-30B-A3B-Instruct-2507"))
    assert found.folder is None and found.shape is not None
    assert (found.shape.num_experts, found.shape.rotary_base) == (128, 1e7)


def test_an_unknown_model_has_no_shape(recipe: Recipe) -> None:
    found = find_model(_with(recipe, "org/never-heard-of"))
    assert found.shape is None and found.folder is None and found.fault is None


def test_a_family_corrects_what_a_new_model_declares(recipe: Recipe) -> None:
    made = Model(
        model_type="qwen3_moe", num_layers=2, hidden_size=16, num_attention_heads=4, padded_vocab_size=300,
        num_query_groups=2, add_qkv_bias=True,
    )  # fmt: skip
    found = find_model(replace(recipe, model=made, moe=MoE(num_experts=4, moe_router_topk=2)))
    assert found.shape is not None
    assert found.shape.architecture == "Qwen3MoeForCausalLM" and found.shape.qk_layernorm
    assert not found.shape.add_qkv_bias, "Qwen3-MoE has none"
    assert found.shape.hf_config["torch_dtype"] == "bfloat16"


def test_an_unknown_family_is_a_fault_with_the_nearest(recipe: Recipe) -> None:
    made = Model(model_type="qwen3_mo", num_layers=2, hidden_size=16, num_attention_heads=4, padded_vocab_size=300)
    found = find_model(replace(recipe, model=made))
    assert found.fault is not None and "qwen3_moe" in str(found.fault)


def test_an_unreadable_config_is_a_fault(recipe: Recipe, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen9ForCausalLM"]}))
    found = find_model(recipe)
    assert found.shape is None and found.fault is not None
    assert "Qwen9ForCausalLM" in str(found.fault) and "Qwen3ForCausalLM" in str(found.fault)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"initializer_range": float("nan")}, "initializer_range=nan is no number in JSON"),
        ({"limits": {"seconds": [0.0, float("inf")]}}, "limits.seconds.1=inf is no number in JSON"),
        ({"model_type": "llama"}, "model_type=llama is not that of architectures=Qwen3ForCausalLM, which is qwen3"),
    ],
)
def test_a_config_that_no_run_can_keep_or_that_contradicts_itself(
    changes: dict[str, object], said: str, recipe: Recipe, model_folder: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | changes))
    found = find_model(recipe)
    assert found.fault is not None and f"config.json: {said}" in str(found.fault)


def test_what_the_trainer_cannot_train_is_refused_before_the_queue(recipe: Recipe, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    assert find_model(recipe).fault is None
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {"sliding_window": 4, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    (model_folder / "config.json").write_text(json.dumps(config))
    found = find_model(recipe)
    assert found.shape is not None and found.fault in missing_inputs(recipe, found)
    assert str(found.fault).startswith(
        "model.model: MistralForCausalLM cannot be trained: rope_type='dynamic' is not built"
    )
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (model_folder / "config.json").write_text(json.dumps(config))
    assert "rope_type='yarn' is not built" in str(find_model(recipe).fault)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"initializer_range": 1}, "initializer_range=1 must be a decimal number, or"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a decimal number"),
        ({"use_cache": None}, "use_cache=None must be true or false"),
        ({"attention_dropout": "0.0"}, "attention_dropout='0.0' must be a number"),
        ({"bos_token_id": [1]}, "bos_token_id=[1] must be a token's number or null"),
        ({"rope_parameters": []}, "rope_parameters=[] must be an object or null"),
        ({"pad_token_id": 32}, "pad_token_id=32 must be below vocab_size=32"),
        ({"layer_types": 3}, "layer_types=3 must be a list of names"),
        ({"layer_types": []}, "layer_types has 0 entries for 1 layers"),
        ({"rope_scaling": {"rope_theta": None}}, "rope_theta=null in rope_scaling must be a number"),
        ({"num_experts": 4, "num_local_experts": None}, "num_experts=4 and num_local_experts=None must be the same"),
        ({"is_causal": False}, "is_causal=false is not supported by this family: each token would see those after it"),
        ({"model_type": "QWEN3"}, "model_type='QWEN3' must be 'qwen3', or transformers cannot load the model"),
        ({"model_type": None}, "model_type=None must be 'qwen3'"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}, "head_dim=null cannot"),
        ({"initializer_range": 1.0, "eos_token_id": [1, 2], "rope_scaling": None, "attention_dropout": 0}, None),
    ],
)  # fmt: skip
def test_a_config_whose_exports_transformers_could_not_load(
    recipe: Recipe, model_folder: Path, changes: dict[str, object], said: str | None
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | changes))
    fault = find_model(recipe).fault
    assert (fault is None) if said is None else said in str(fault)
