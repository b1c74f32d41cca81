"""A reference that follows the policy: the blend, checkpoints of it, layouts, adapters, a resume between blends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, metrics, recipe_on, train, with_fields, write_run
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megabatch.cli.evaluate import prepared as evaluation_of
from megabatch.config.run import RunConfig
from megabatch.entry.evaluation import evaluation_recipe, require_reference, trained_recipe
from megabatch.trainer.references import Following

OURS = "frozen.reference."
FULL = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
COPY = {**FULL, "ref_model_mixup_alpha": 1.0}
RUNS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", 1, FULL, {}),
    "qwen2 tp2": ("qwen2", 2, FULL, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "qwen2 vpp2": ("qwen2", 2, FULL, {
        "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "qwen3_moe": ("qwen3_moe", 1, FULL, {}),
    "qwen3_moe ep2": ("qwen3_moe", 2, FULL, {"expert_model_parallel_size": 2}),
    "lora": ("lora", 1, COPY, {}),
    "lora tp2": ("lora", 2, COPY, {"tensor_model_parallel_size": 2}),
}  # fmt: skip
"""Model, ranks, how the reference follows, layout."""


def prepared(folder: Path, name: str, as_: str | None = None) -> tuple[Path, int]:
    """A run of DPO on pairs, of four steps, each of which is saved."""
    model, world, rlhf, parallel = RUNS[name]
    lora = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
    made = recipe_on(
        folder,
        "qwen2" if model == "lora" else model,
        parallel=parallel,
        tuner=lora if model == "lora" else {},
        rlhf=rlhf,
        dpo={"beta": 0.5},
        learning_rate={"lr": 0.02, "min_lr": 0.02},
        optimizer={"adam_eps": 1e-3, "weight_decay": 0.0},
        batch={"global_batch_size": 4},
        checkpoint={"save_interval": 1},
        evaluation={"eval_interval": 3, "eval_on_start": False},
        resources={"tasks_per_node": world},
    )
    return write_run(replace(made, task="rlhf"), folder / (as_ or name)), world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("following")
    rows = [{"query": f"{n} + 7?", "response": str(n + 7), "rejected_response": f"It is {n} or so"} for n in range(18)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    return folder


@pytest.fixture(scope="module")
def done(ranks: RankServer, folder: Path) -> dict[str, Path]:
    found = {}
    for name in RUNS:
        run, world = prepared(folder, name)
        assert set(ranks.run(train, world_size=world, run_dir=str(run))) == {0}
        found[name] = run
    return found


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of the model and of its reference in a checkpoint."""
    reader = FileSystemReader(run / "checkpoints" / f"step_{step:08d}" / "mcore")
    state = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        for key, one in reader.read_metadata().state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata) and not key.startswith("optimizer")
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_the_reference_is_the_blend_of_what_it_was_and_the_policy(done: dict[str, Path]) -> None:
    first, second, third, fourth = (saved(done["qwen2"], step) for step in (1, 2, 3, 4))
    names = [key for key in first if not key.startswith(OURS)]
    assert len(names) > 5 and {OURS + name for name in names} == {key for key in first if key.startswith(OURS)}
    for name in names:
        ref = OURS + name
        assert torch.allclose(second[ref], 0.25 * second[name] + 0.75 * first[ref], rtol=1e-6, atol=1e-8), name
        assert torch.equal(third[ref], second[ref]), name
        assert torch.allclose(fourth[ref], 0.25 * fourth[name] + 0.75 * third[ref], rtol=1e-6, atol=1e-8), name
    assert any(not torch.equal(first[OURS + name], second[OURS + name]) for name in names)


def test_an_adapter_is_copied(done: dict[str, Path]) -> None:
    first, second, third = (saved(done["lora"], step) for step in (1, 2, 3))
    ours = [key for key in first if key.startswith(OURS)]
    assert len(ours) > 5
    for key in ours:
        name = key.removeprefix(OURS)
        assert not first[key].any() and torch.equal(second[key], second[name]), key
        assert torch.equal(third[key], second[key]), key


@pytest.mark.parametrize("name", [name for name in RUNS if " " in name])
def test_a_layout_changes_no_number(name: str, done: dict[str, Path]) -> None:
    """Up to the step after the first blend; rounding grows from there on."""
    alone = done[name.split(maxsplit=1)[0]]
    for found, expected in zip(metrics(done[name])[:3], metrics(alone)[:3], strict=True):
        for number in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert found[number] == pytest.approx(expected[number], rel=2e-5, abs=1e-5), (found["step"], number)


def test_the_third_step_of_a_copy_compares_equal_models(done: dict[str, Path]) -> None:
    margins = [line["rewards/margins"] for line in metrics(done["lora"])]
    assert margins[0] == pytest.approx(0, abs=1e-6) == margins[2] and abs(margins[1]) > 1e-5 < abs(margins[3])


@pytest.mark.parametrize("name", ["qwen2 tp2", "lora"])
def test_a_stopped_run_goes_on_exactly(name: str, ranks: RankServer, folder: Path, done: dict[str, Path]) -> None:
    run, world = prepared(folder, name, as_=f"cut_{name}")
    assert set(ranks.run(train, world_size=world, run_dir=str(run), stop_after=3)) == {75}
    assert set(ranks.run(train, world_size=world, run_dir=str(run))) == {0}
    assert curve(run) == curve(done[name])


def evaluate_run(run_dir: str) -> int:
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.evaluating import evaluate

    return int(evaluate(RunConfig.load(Path(run_dir) / "run.json"), Activity(0)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qwen2", []),
        ("qwen2 tp2", ["--tensor_model_parallel_size", "1", "--sequence_parallel", "false"]),
        ("lora tp2", []),
    ],
)
def test_an_evaluation_has_the_reference_of_its_checkpoint(
    name: str, flags: list[str], ranks: RankServer, tmp_path: Path, done: dict[str, Path]
) -> None:
    """After a step beyond a blend, on the same layout and another one: the numbers that the trainer had there."""
    recipe = evaluation_recipe(trained_recipe(done[name], checkpoint="step_00000003"), flags, task=None)
    require_reference(recipe, done[name])
    evaluation_of(recipe, tmp_path, target=done[name])
    assert set(ranks.run(evaluate_run, world_size=recipe.resources.world_size, run_dir=str(tmp_path))) == {0}
    found = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    (then,) = (line for line in metrics(done[name], "eval") if line["step"] == 3)
    assert abs(found["rewards/margins"]) > 1e-4
    for number in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert found[number] == pytest.approx(then[f"eval_{number}"], rel=2e-6, abs=2e-7), number


def test_a_checkpoint_without_the_reference_is_refused(
    ranks: RankServer, tmp_path: Path, done: dict[str, Path]
) -> None:
    """As of a run that began to follow late: what its model began with is no reference of its earlier steps."""
    made = RunConfig.load(done["qwen2"] / "run.json").recipe
    late = with_fields(
        made,
        training={"train_iters": 1},
        rlhf={"sync_ref_model": False, "ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6},
    )
    run = write_run(late, tmp_path / "late")
    assert set(ranks.run(train, world_size=1, run_dir=str(run))) == {0}
    write_run(made, run)
    (folder := tmp_path / "evaluation").mkdir()
    evaluation_of(evaluation_recipe(trained_recipe(run, checkpoint=None), [], task=None), folder, target=run)
    with pytest.raises(RuntimeError, match="has no reference that follows the policy"):
        ranks.run(evaluate_run, world_size=1, run_dir=str(folder))


def test_blends_are_counted_from_the_start_of_the_run() -> None:
    following = Following(every=3, alpha=1.0)
    assert [step for step in range(10) if following.is_due(step)] == [3, 6, 9]
