"""Resolving a recipe, and run.json."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

import megabatch
from megabatch.config.declare import parameters
from megabatch.config.new_model import declared_shape
from megabatch.config.recipe import Recipe
from megabatch.config.run import SCHEMA_VERSION, RunConfig, resolve, save_folder
from megabatch.config.walltime import seconds
from megabatch.errors import ConfigError


def run_of(recipe, **provenance):
    shape = declared_shape(recipe)
    return resolve(recipe, shape=shape, run_dir=Path("/runs/one"), provenance=provenance)


def test_derived_values(dense, changed):
    run = run_of(dense)
    recipe = run.recipe
    assert (recipe.learning_rate.lr, recipe.evaluation.eval_interval) == (1e-5, 500)
    assert (recipe.precision.bf16, recipe.precision.fp16, recipe.model.torch_dtype) == (False, False, "float32")
    assert (recipe.data.loss_scale, recipe.data.truncation_strategy) == ("default", "delete")
    assert (recipe.data.seq_length, recipe.data.packing_length) == (128, None)
    assert recipe.training.calculate_per_token_loss is True
    assert recipe.logging.tensorboard_dir == "/runs/one/runs"
    assert recipe.checkpoint.save == "megatron_output/dense"
    assert (recipe.resources.tasks_per_node, recipe.resources.job_name) == (8, "dense")
    assert recipe.training.train_iters is None and recipe.learning_rate.lr_decay_iters is None
    assert (run.layout.dp, run.layout.num_microbatches, run.layout.edp) == (8, 2, 8)


def test_given_values_stay(dense, changed):
    recipe = changed(
        dense,
        {
            "learning_rate": {"lr": 1e-3},
            "evaluation": {"eval_interval": 7},
            "training": {"calculate_per_token_loss": False},
            "data": {"loss_scale": "last_round", "truncation_strategy": "right", "packing": True},
            "task": "pt",
        },
    )
    resolved = run_of(recipe).recipe
    assert (resolved.learning_rate.lr, resolved.evaluation.eval_interval) == (1e-3, 7)
    assert resolved.training.calculate_per_token_loss is False
    assert (resolved.data.loss_scale, resolved.data.truncation_strategy) == ("last_round", "right")
    assert resolved.data.packing_length == 128
    assert run_of(replace(dense, task="pt")).recipe.data.loss_scale == "all"


def test_a_pipeline_knows_its_groups_of_micro_batches(dense, changed):
    pipelined = changed(dense, {"parallel": {"pipeline_model_parallel_size": 2}})
    assert run_of(pipelined).recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage == 2
    assert run_of(dense).recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage is None


@pytest.mark.parametrize("room", ["trainer", "data"])
def test_nothing_falls_back_on_a_constant_of_its_own(room):
    """A parameter's default is declared, and what follows from others is derived: nobody says it a second time."""
    names, found = {parameter.name for parameter in parameters(Recipe)}, []
    for path in sorted((Path(megabatch.__file__).parent / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.BoolOp) or not isinstance(node.values[-1], ast.Constant):
                continue
            first = node.values[0]
            if isinstance(first, ast.Attribute) and first.attr in names and "shape" not in ast.unparse(first):
                found.append((path.name, ast.unparse(node)))
    assert not found


@pytest.mark.parametrize(
    ("hf_config", "dtype"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float32"}, "float32"), ({}, "bfloat16")],
)
def test_the_type_of_weights_comes_from_config_json(dense, changed, dense_shape, hf_config, dtype):
    recipe = replace(dense, model=replace(type(dense.model)(), model="org/m"))
    run = resolve(recipe, shape=replace(dense_shape, hf_config=hf_config), run_dir=Path("r"), provenance={})
    assert run.recipe.model.torch_dtype == dtype
    assert run.recipe.precision.bf16 is (dtype == "bfloat16")
    assert run.recipe.model.tokenizer == "org/m"
    assert save_folder(recipe) == Path("megatron_output/m")


def test_resolving_reports_every_fault(dense, changed):
    recipe = changed(dense, {"batch": {"global_batch_size": 9}, "parallel": {"sequence_parallel": True}})
    with pytest.raises(ConfigError, match="2 faults, nothing was started"):
        run_of(recipe)


def test_resolving_twice_changes_nothing(experts):
    once = run_of(experts)
    again = resolve(once.recipe, shape=once.shape, run_dir=Path("/runs/one"), provenance={})
    assert again == once


def test_round_trip_is_exact(experts, changed, tmp_path):
    recipe = changed(
        experts,
        {
            "moe": {"moe_layer_freq": [1, 0, 1, 0]},
            "data": {"dataset": ["ä.jsonl#5", "b"], "columns": {"q": "query"}},
            "recompute": {"recompute_modules": ["core_attn", "moe"]},
            "training": {"megatron_extra_kwargs": {"window": (1, 2), "deep": {"x": None}}},
            "model": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        },
    )
    run = run_of(recipe, argv=("a", "b"), commit=None)
    run.save(tmp_path / "run.json")
    loaded = RunConfig.load(tmp_path / "run.json")
    assert loaded == run
    assert loaded.recipe.data.dataset == ("ä.jsonl#5", "b") and isinstance(loaded.recipe.moe.moe_layer_freq, tuple)
    assert loaded.shape.moe_layers == (True, False, True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def edited(run, path, edit):
    found = json.loads(path.read_text()) if path.exists() else None
    if found is None:
        run.save(path)
        found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda run: run.update(schema_version=SCHEMA_VERSION + 1), ["schema_version=2", "reads 1"]),
        (lambda run: run.pop("schema_version"), ["schema_version=None"]),
        (
            lambda run: run["recipe"]["parallel"].update(tensor_model_parallel_sise=2),
            [
                "recipe: parallel",
                "tensor_model_parallel_sise is not a field of Parallel",
                "try tensor_model_parallel_size",
            ],
        ),
        (lambda run: run["recipe"].pop("task"), ["task of Recipe is missing"]),
        (lambda run: run["layout"].popitem(), ["of Layout is missing"]),
        (lambda run: run["recipe"]["batch"].update(micro_batch_size="two"), ["edited", "micro_batch_size='two'"]),
        (lambda run: run.update(layout=3), ["layout must be an object with the fields of Layout"]),
    ],
)
def test_edited_files_are_refused_by_name(dense, tmp_path, edit, words):
    path = edited(run_of(dense), tmp_path / "run.json", edit)
    with pytest.raises(ConfigError) as error:
        RunConfig.load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_parameters_that_came_later_get_their_defaults(dense, tmp_path, caplog):
    run = run_of(dense)

    def older(found):
        for name in ("prm", "embedding"):
            found["recipe"].pop(name)
        for name in ("lora_fused", "use_rslora"):
            found["recipe"]["tuner"].pop(name)
        found["recipe"]["rlhf"].pop("share_prompts")

    assert RunConfig.load(edited(run, tmp_path / "run.json", older)) == run
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("without prm, embedding, lora_fused, use_rslora, share_prompts; taking their defaults")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        RunConfig.load(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        RunConfig.load(tmp_path / "run.json")


def test_the_name_of_a_token_is_all_that_is_written(dense, changed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    run_of(changed(dense, {"bridge": {"hub_token": "HF_TOKEN"}})).save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    assert "HF_TOKEN" in text and "verysecret" not in text


def test_nothing_derivable_is_none(dense):
    """What is still None either means something itself or is known only when the data is prepared."""
    recipe = run_of(dense).recipe
    derived = {
        "model": ("torch_dtype",),
        "data": ("loss_scale", "max_length", "seq_length", "truncation_strategy"),
        "training": ("calculate_per_token_loss",),
        "learning_rate": ("lr",),
        "precision": tuple(field.name for field in fields(recipe.precision)),
        "checkpoint": ("save",),
        "logging": ("tensorboard_dir",),
        "evaluation": ("eval_interval",),
        "resources": ("tasks_per_node", "job_name", "omp_num_threads"),
    }
    for group, names in derived.items():
        assert all(getattr(getattr(recipe, group), name) is not None for name in names), group


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("1", 60),
        ("2:30", 150),
        ("1:00:00", 3600),
        ("1-0", 86400),
        ("1-12", 129600),
        ("2-1:30", 178200),
        ("0-0:0:5", 5),
    ],
)
def test_walltime(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "0", "1h", "1:2:3:4", "-1", "infinite"])
def test_bad_walltime(time):
    with pytest.raises(ConfigError, match="must be"):
        seconds(time)
