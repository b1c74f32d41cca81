"""The same faults before the queue, whether a recipe, a chain or a sweep is submitted."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from megabatch import Recipe
from megabatch.cli.recipe_command import main
from megabatch.entry import megatron_fields

FILE = """\
from megabatch import Batch, Chain, Data, Model, Recipe, Resources, Step, Sweep, Training

TOKEN = {token!r}
ORDINARY = "sk-learn-models-of-2024-and-later hf_datasetsfromthehub"


def recipe():
    return Recipe(
        name="tiny",
        task="sft",
        model=Model(model={model!r}),
        data=Data(dataset=[{dataset!r}], max_length=64),
        batch=Batch(micro_batch_size=1, global_batch_size=4),
        training=Training(train_iters=2),
        resources=Resources(nodes=1, gpus_per_node=2, time="1:00:00"),
    )


def chain():
    return Chain(name="c", steps=[Step("train", recipe())])


sweep = Sweep(recipe, grid={{"seed": [1, 2]}})
"""
WAYS = ("recipe", "chain", "sweep")
TOKEN = "hf_" + "aB3" * 11


def submitted(way: str, folder: Path, capsys: pytest.CaptureFixture[str], token: str, *flags: str) -> str:
    file = folder / "own.py"
    text = FILE.format(token=token, model=str(folder / "models/tiny-qwen3"), dataset=str(folder / "train.jsonl"))
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("own", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ended:
        main(getattr(module, way), ["--submit", "--run_dir", str(folder / "runs"), *flags])
    assert ended.value.code == 2 and not (folder / "runs").exists()
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    return said.err


@pytest.mark.usefixtures("model_folder", "dataset")
@pytest.mark.parametrize("way", WAYS)
def test_a_token_in_the_file_and_inputs_that_no_mount_shows(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    profile = tmp_path / "profile.toml"
    profile.write_text('local_cache = "/var/cache"\n[container]\nimage = "a#b:c"\n')
    said = submitted(way, tmp_path, capsys, TOKEN, "--cluster", str(profile))
    assert f"{tmp_path}/own.py:3 holds a Hugging Face token, and others can read the copy" in said
    assert "data.dataset=" in said and f"add '{tmp_path}' to container.mounts" in said
    assert "model.model=" in said and said.startswith("error: 3 faults, nothing was started\n")


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_missing(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = submitted(way, tmp_path, capsys, "no token")
    assert "1 fault, " in said and "train.jsonl" in said and "does not exist" in said


@pytest.mark.usefixtures("dataset", "model_folder")
def test_what_is_on_modelscope_needs_its_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megabatch.entry.launch_checks.find_spec", lambda name: None if name == "modelscope" else object()
    )
    flags = ("--model", "Qwen/Qwen2.5-7B-Instruct", "--dataset", "openai/gsm8k", "hf::a/b", "--tasks_per_node", "2")
    said = submitted("recipe", tmp_path, capsys, "no token", *flags)
    package = f"is on ModelScope, whose package modelscope {sys.executable} lacks (pip install modelscope); try "
    assert f"model.model='Qwen/Qwen2.5-7B-Instruct' {package}--use_hf true\n" in said
    assert f"data.dataset='openai/gsm8k' {package}--use_hf true, or hf:: before the name\n" in said
    assert said.startswith("error: 2 faults")


@pytest.mark.usefixtures("dataset", "model_folder")
def test_a_field_that_megatron_core_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless another Python, which may have another megatron-core, is the ranks'."""
    flags = ("--tasks_per_node", "2", "--megatron_extra_kwargs", '{"barrier_with_L1_tim": false}')
    said = submitted("recipe", tmp_path, capsys, "no token", *flags)
    assert (
        "training.megatron_extra_kwargs names barrier_with_L1_tim, which is no field of this megatron-core's" in said
    )
    assert "TransformerConfig; try barrier_with_L1_time\n" in said
    (tmp_path / "site.toml").write_text('python = "/opt/python"\n')
    other = ("--cluster", str(tmp_path / "site.toml"), "--dataset", "nowhere.jsonl")
    said = submitted("recipe", tmp_path, capsys, "no token", *flags, *other)
    assert "nowhere.jsonl" in said and "barrier" not in said


def test_the_fields_of_megatron_core() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert megatron_fields._fields() == {field.name for field in dataclasses.fields(TransformerConfig)}


def test_a_python_that_cannot_train_is_refused_before_the_queue(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the interpreter that submits, unless the profile says where another one, or its packages, come from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megabatch.entry.launch_checks.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(lambda: recipe, ["--submit"])
    assert ended.value.code == 2
    assert f"{sys.executable} lacks torch, megatron, transformers, and the ranks" in capsys.readouterr().err
    for line in ('python = "/opt/python"', 'modules = ["pytorch"]', 'setup = ["source /opt/venv/bin/activate"]'):
        (tmp_path / "site.toml").write_text(line + "\n")
        with pytest.raises(SystemExit):
            main(lambda: recipe, ["--dry_run", "--cluster", str(tmp_path / "site.toml")])
        assert "lacks torch" not in capsys.readouterr().err
