"""A reference or a teacher that is missing, damaged or of another shape is seen before a run is queued."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megabatch import Bridge, Gkd, Grpo, Recipe, Rlhf
from megabatch.entry.input_checks import damaged_inputs, missing_inputs
from megabatch.entry.model import find_model


def faults(recipe: Recipe) -> list[str]:
    model = find_model(recipe)
    return [str(fault) for fault in (*missing_inputs(recipe, model), *damaged_inputs(recipe, model))]


@pytest.fixture
def compared(recipe: Recipe, dataset: Path) -> Recipe:
    row = {"query": "1 + 1?", "response": "2", "rejected_response": "3"}
    dataset.write_text(f"{json.dumps(row)}\n" * 20)
    return replace(recipe, task="rlhf", rlhf=Rlhf(rlhf_type="dpo"))


@pytest.fixture
def distilled(recipe: Recipe) -> Recipe:
    return replace(recipe, task="rlhf", rlhf=Rlhf(rlhf_type="gkd"))


def other(folder: Path, name: str, **config: Any) -> Path:
    """A copy of a model whose config.json says something else."""
    copied = folder.with_name(name)
    shutil.copytree(folder, copied)
    said = json.loads((folder / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**said, **config}))
    return copied


def test_a_reference_of_the_same_shape(compared: Recipe, model_folder: Path) -> None:
    assert faults(compared) == []
    beside = other(model_folder, "sft")
    assert faults(replace(compared, bridge=Bridge(ref_model=str(beside)))) == []
    assert faults(replace(compared, bridge=Bridge(ref_model="org/on-the-hub"))) == []


def test_reward_models(recipe: Recipe, dataset: Path, model_folder: Path, tmp_path: Path) -> None:
    dataset.write_text(f"{json.dumps({'query': '1 + 1?'})}\n" * 20)
    made = replace(recipe, task="rlhf", rlhf=Rlhf(rlhf_type="grpo"))
    judge = other(model_folder, "judge", architectures=["Qwen3ForSequenceClassification"])
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, said in (
        (judge, ""),
        ("org/not-here", "is neither a local folder nor downloaded; run first: hf download org/not-here"),
        (tmp_path / "models" / "judges", "does not exist; nearest in"),
        (empty, "cannot be loaded: "),
        (model_folder, "must be a classifier, and is Qwen3ForCausalLM; a run of rlhf_type=rm exports one"),
    ):
        found = [f for f in faults(replace(made, grpo=Grpo(reward_model=(str(name),)))) if "grpo.reward_model=" in f]
        assert len(found) == bool(said) and all(said in fault for fault in found), (name, found)


def test_a_profiles_shared_cache_is_asked(
    compared: Recipe, distilled: Recipe, model_folder: Path, tmp_path: Path
) -> None:
    """As for the model itself."""
    repository = tmp_path / "shared" / "huggingface" / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(other(model_folder, "other", num_hidden_layers=2, vocab_size=4000))
    shared = str(tmp_path / "shared")
    for recipe, rule in (
        (replace(compared, bridge=Bridge(ref_model="org/tiny")), "must be a model of the policy's shape, and has "),
        (replace(distilled, gkd=Gkd(teacher_model="org/tiny")), "has 4,000 tokens and the student "),
    ):
        model = find_model(recipe)
        assert missing_inputs(recipe, model) == [] == damaged_inputs(recipe, model)
        assert [rule in str(fault) for fault in missing_inputs(recipe, model, shared_cache=shared)] == [True]
        assert "cannot be read: " in str(damaged_inputs(recipe, model, shared_cache=shared))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"num_hidden_layers": 2}, "must be a model of the policy's shape, and has num_layers=2 and not 1"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type='llama' and not 'qwen3'"),
        ({"model_type": "unheard_of", "architectures": ["Unheard"]}, "cannot be used: config.json"),
    ],
)
def test_another_shape_or_family(compared: Recipe, model_folder: Path, config: dict[str, Any], rule: str) -> None:
    folder = other(model_folder, "other", **config)
    found = faults(replace(compared, bridge=Bridge(ref_model=str(folder))))
    assert found[0].startswith(f"bridge.ref_model={str(folder)!r} ") and rule in found[0]


def test_a_missing_or_damaged_reference(compared: Recipe, model_folder: Path) -> None:
    missing = model_folder.with_name("tiny-qwen4")
    (found,) = faults(replace(compared, bridge=Bridge(ref_model=str(missing))))
    assert found == (
        f"bridge.ref_model={str(missing)!r} does not exist; nearest in {model_folder.parent}: {model_folder.name}"
    )
    damaged = other(model_folder, "damaged")
    (damaged / "model.safetensors").write_bytes(b"none")
    (found,) = faults(replace(compared, bridge=Bridge(ref_model=str(damaged))))
    assert found.startswith(f"bridge.ref_model={str(damaged)!r} cannot be read: ")
    (found,) = faults(replace(compared, rlhf=Rlhf(ref_load=str(model_folder))))
    assert found.startswith(
        f"rlhf.ref_load={str(model_folder)!r} cannot be loaded: {model_folder} holds no checkpoint"
    )
    for given in ({"bridge": Bridge(ref_adapters=[str(missing)])}, {"rlhf": Rlhf(ref_adapter_load=str(missing))}):
        (found,) = faults(replace(compared, **given))  # type: ignore[arg-type]
        assert str(missing) in found


def test_a_teacher(distilled: Recipe, model_folder: Path) -> None:
    def taught(folder: Path) -> list[str]:
        return faults(replace(distilled, gkd=Gkd(teacher_model=str(folder), gkd_logits_topk=4)))

    assert taught(model_folder) == []
    (found,) = taught(model_folder.with_name("nobody"))
    assert "gkd.teacher_model=" in found and "does not exist" in found
    found, *_ = taught(other(model_folder, "many-words", vocab_size=4096))
    assert "has 4,096 tokens and the student 32: distillation compares tokens by their ids" in found
    damaged = other(model_folder, "damaged")
    (damaged / "model.safetensors").unlink()
    (found,) = taught(damaged)
    assert found.startswith(f"gkd.teacher_model={str(damaged)!r} cannot be read: ")
    own = Gkd(teacher_model=str(model_folder), gkd_logits_topk=4, teacher_pipeline_model_parallel_size=2)
    (found,) = faults(replace(distilled, gkd=own))
    assert "gkd.teacher_pipeline_model_parallel_size=2 must divide the model's num_layers=1, which are spread" in found


def test_a_teacher_lies_over_the_students_stages(distilled: Recipe, model_folder: Path) -> None:
    stages = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    staged = replace(distilled, parallel=replace(distilled.parallel, **stages))  # type: ignore[arg-type]
    for layers, divides in ((4, True), (2, False)):
        teacher = other(model_folder, f"{layers} layers", num_hidden_layers=layers)
        found = faults(replace(staged, gkd=Gkd(teacher_model=str(teacher), gkd_logits_topk=4)))
        rule = f"must divide over 2 stages of 2 chunks: the model's num_layers={layers} do not"
        assert any(rule in one and "or give teacher_pipeline_model" in one for one in found) is not divides


def test_a_teacher_with_fewer_tokens_than_the_students_tokenizer(distilled: Recipe, model_folder: Path) -> None:
    """Rows of the student that its tokenizer does not use are nothing to a teacher."""
    fewer = other(model_folder, "fewer", vocab_size=30)
    hidden = json.loads((model_folder / "config.json").read_text())["hidden_size"]
    rewrite_embedding(fewer, rows=30, width=hidden)
    for ids, refused in ((30, False), (31, True), (40, True)):
        vocabulary = {f"token {n}": n for n in range(ids)}
        (model_folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        found = faults(replace(distilled, gkd=Gkd(teacher_model=str(fewer), gkd_logits_topk=4)))
        known = min(ids, 32)
        rule = f"has 30 tokens, and the student's tokenizer {known}: a teacher without all of them cannot read what "
        assert found == [] if not refused else len(found) == 1 and rule in found[0]


def test_another_tokenizer_is_none_of_the_students(compared: Recipe, distilled: Recipe, model_folder: Path) -> None:
    """A few other tokens are what fine-tuning adds; most of them are another tokenizer of the same size."""
    beside = other(model_folder, "beside")

    def write(folder: Path, tokens: list[str]) -> None:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))

    for differing in (3, 12):
        write(model_folder, [f"token {n}" for n in range(20)])
        write(beside, [*(f"other {n}" for n in range(differing)), *(f"token {n}" for n in range(differing, 20))])
        taught = faults(replace(distilled, gkd=Gkd(teacher_model=str(beside), gkd_logits_topk=4)))
        referred = faults(replace(compared, bridge=Bridge(ref_model=str(beside))))
        rule = "12 of the 20 ids that both have stand for other tokens (id 0 for 'other 0' and 'token 0')"
        for found in (taught, referred):
            assert found == [] if differing == 3 else len(found) == 1 and rule in found[0]


def rewrite_embedding(folder: Path, *, rows: int, width: int) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = np.zeros((rows, width), np.float32)
    save_file(tensors, path)


@pytest.mark.parametrize("field", ["model", "reference", "teacher"])
def test_an_adapter_is_no_model(compared: Recipe, distilled: Recipe, model_folder: Path, field: str) -> None:
    """transformers applies one that lies in the model's folder."""
    alone, beside = model_folder.with_name("adapter"), other(model_folder, "beside")
    alone.mkdir()
    for folder in (alone, beside):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"")

    def said(folder: Path) -> list[str]:
        if field == "model":
            return faults(replace(compared, model=replace(compared.model, model=str(folder))))
        if field == "reference":
            return faults(replace(compared, bridge=Bridge(ref_model=str(folder))))
        return faults(replace(distilled, gkd=Gkd(teacher_model=str(folder), gkd_logits_topk=4)))

    for folder, rule in ((alone, "is an adapter, not a model"), (beside, "holds an adapter beside a model")):
        (found,) = said(folder)
        assert f"{folder} {rule}" in found and f"megabatch-convert --merge_lora --adapters {folder}" in found
    (beside / "adapter_model.safetensors").unlink()
    assert said(beside) == []


@pytest.mark.parametrize("label", [True, False])
def test_answers_of_one_kind(recipe: Recipe, dataset: Path, label: bool) -> None:
    row = {"prompt": "1 + 1?", "completion": "2", "label": label}
    dataset.write_text(f"{json.dumps(row)}\n" * 20)
    judged = replace(recipe, task="rlhf", rlhf=Rlhf(rlhf_type="kto"))
    (found,) = faults(judged)
    kind, lacking = ("good", "bad") if label else ("bad", "good")
    rule = f"is a {kind} answer, as all are; the loss tells good from bad ones, so add {lacking} ones"
    assert found == f"data.dataset: {dataset}:1: {rule}"
    unread = dataset.with_suffix(".parquet")  # not by the launcher, whatever is said of how many rows are wanted
    unread.write_bytes(b"PAR1")
    both = replace(judged.data, dataset=(str(dataset), f"{unread}#10"))
    assert faults(replace(judged, data=both)) == []
    with open(dataset, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "label": not label}) + "\n")
    assert faults(judged) == []
