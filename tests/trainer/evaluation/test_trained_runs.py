"""`megabatch evaluate` on a trained run of each task: the metrics of its last evaluation while it trained."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import generating, metrics, recipe_on, train, with_fields, write_run

sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))

from adapted import make_base

from megabatch import Dpo, Embedding, Gkd, Kto, Model, Recipe, Rlhf, Rollout, Training
from megabatch.cli.evaluate import prepared
from megabatch.config.evaluation_metrics import evaluation_metrics
from megabatch.config.rules.check import check
from megabatch.config.run import RunConfig
from megabatch.entry.evaluation import evaluation_recipe, require_reference, trained_recipe, untrained_recipe
from megabatch.errors import ConfigError

ROWS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "pt": lambda a, b: {"text": f"{a} + {b} = {a + b}"},
    "sft": lambda a, b: {"query": f"{a} + {b}?", "response": str(a + b)},
    "gkd": lambda a, b: {"query": f"{a} + {b}?", "response": str(a + b)},
    "dpo": lambda a, b: {"query": f"{a} + {b}?", "response": str(a + b), "rejected_response": str(a - b)},
    "rm": lambda a, b: {"query": f"{a} + {b}?", "response": str(a + b), "rejected_response": str(a - b)},
    "kto": lambda a, b: {"query": f"{a} + {b}?", "response": str(a + b), "label": a < b},
    "prm": lambda a, b: {"prompt": f"{a} + {b}?", "completions": [str(a), str(b)], "labels": [a < b, b < 50]},
    "seq_cls": lambda a, b: {"text": f"{a} + {b}", "label": a < b},
    "embedding": lambda a, b: {"query": f"{a} + {b}", "positive": str(a + b), "negative": str(a - b)},
}
"""Of each task, from two numbers."""


def write_rows(task: str, folder: Path) -> dict[str, list[str]]:
    """Training and validation data."""
    draw, files = random.Random(0), {}
    for part, count in (("dataset", 8), ("val_dataset", 3)):
        rows = [ROWS[task](draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
        (file := folder / f"{task}.{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files[part] = [str(file)]
    return files


def made(task: str, folder: Path, base: Path) -> Recipe:
    """A run of one step."""
    one = recipe_on(
        folder,
        "qwen3",
        data=write_rows(task, folder),
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        training={"train_iters": 1},
        evaluation={"eval_on_start": False, "eval_interval": 1},
        checkpoint={"no_save_optim": True},
    )
    one = replace(one, model=Model(model=str(base), torch_dtype="float32"))
    if task == "dpo":  # its reference gets them too
        one = replace(one, model=replace(one.model, new_special_tokens=[f"<{n}>" for n in range(60)]))
    if task in ("dpo", "kto", "rm", "prm", "gkd"):
        gkd = Gkd(teacher_model=str(base), lmbda=0.0) if task == "gkd" else Gkd()
        one = replace(one, task="rlhf", rlhf=Rlhf(rlhf_type=task), gkd=gkd)
    of_task: dict[str, dict[str, Any]] = {
        "pt": {"task": "pt"},
        "dpo": {"dpo": Dpo(beta=0.5)},
        "kto": {"kto": Kto(beta=0.5)},
        "seq_cls": {"training": Training(task_type="seq_cls", num_labels=2, train_iters=1, seed=3)},
        "embedding": {
            "training": Training(task_type="embedding", train_iters=1, seed=3),
            "embedding": Embedding(infonce_temperature=0.5),
        },
    }
    return replace(one, **of_task.get(task, {}))


def test_a_reference_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    """A flag gives it. One that followed the policy is in the checkpoint, unless that has no `mcore/`."""
    base = make_base(tmp_path, "dense")
    dpo = made("dpo", tmp_path, base)
    new = replace(dpo, model=recipe_on(tmp_path, "qwen3").model)
    followed = replace(dpo, rlhf=replace(dpo.rlhf, sync_ref_model=True))
    named = replace(followed, bridge=replace(dpo.bridge, ref_model=str(base)))
    for name, one, why in (
        ("new", new, "began with a new model"),
        ("followed", followed, "followed the policy"),
        ("named", named, "followed the policy"),
    ):
        run = write_run(one, tmp_path / name)
        (hf := run / "checkpoints" / "step_00000001" / "hf").mkdir(parents=True)
        shutil.copy(base / "config.json", hf)
        recipe = trained_recipe(run, checkpoint="step_00000001")
        with pytest.raises(ConfigError, match=f"{why}.*; name a reference with --ref_model"):
            require_reference(evaluation_recipe(recipe, [], task=None), run)
        given = evaluation_recipe(recipe, ["--ref_model", str(base)], task=None)
        require_reference(given, hf.parent)
        assert (given.bridge.ref_model, given.rlhf.sync_ref_model) == (str(base), False)
        (hf.parent / "mcore").mkdir()
        if name != "new":
            kept = evaluation_recipe(trained_recipe(run, checkpoint="step_00000001"), [], task=None)
            require_reference(kept, run)
            assert (kept.bridge.ref_model, kept.checkpoint.load) == (None, str(hf.parent))
            given = evaluation_recipe(trained_recipe(run, checkpoint=None), ["--ref_model", str(base)], task=None)
            assert (given.bridge.ref_model, given.rlhf.sync_ref_model) == (str(base), False)


def test_training_that_is_yet_to_begin_has_its_first_reference(tmp_path: Path) -> None:
    dpo = made("dpo", tmp_path, make_base(tmp_path, "dense"))
    follows = replace(dpo, rlhf=replace(dpo.rlhf, sync_ref_model=True, ref_model_sync_steps=3))
    assert untrained_recipe(follows).rlhf == dpo.rlhf
    begins = replace(follows, checkpoint=replace(dpo.checkpoint, load="run", finetune=True))
    assert untrained_recipe(begins).rlhf == dpo.rlhf
    goes_on = replace(begins, checkpoint=replace(begins.checkpoint, finetune=False))
    assert untrained_recipe(goes_on).rlhf == follows.rlhf


@pytest.mark.parametrize(
    ("groups", "of_bridge"),
    [
        ({"grpo": {"kl_in_reward": True, "advantage_estimator": "reinforce_plus_plus"}}, {}),
        ({"rlhf": {"sync_ref_model": True}}, {}),
        ({"rlhf": {"ref_load": "x"}}, {}),
        ({"rlhf": {"ref_model_server": "http://localhost:1"}}, {}),
        ({}, {"ref_model": "x"}),
    ],
)
def test_a_run_of_rewards_is_evaluated_without_its_reference(
    groups: dict[str, Any], of_bridge: dict[str, str], tmp_path: Path
) -> None:
    base = make_base(tmp_path, "dense")
    one = generating(made("sft", tmp_path, base), Rollout(max_completion_length=8))
    one = with_fields(one, **groups)
    run = write_run(replace(one, bridge=replace(one.bridge, **of_bridge)), tmp_path / "run")
    (run / "checkpoints" / "step_00000001" / "mcore").mkdir(parents=True)
    evaluated = evaluation_recipe(trained_recipe(run, checkpoint="step_00000001"), [], task=None)
    assert not check(evaluated, RunConfig.load(run / "run.json").shape)


def train_all(run_dirs: list[str]) -> list[int]:
    """On one rank, one after the other."""
    return [train(run_dir) for run_dir in run_dirs]


def evaluate_all(run_dirs: list[str]) -> list[int]:
    from megabatch.config.run import RunConfig
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.evaluating import evaluate

    return [int(evaluate(RunConfig.load(Path(one) / "run.json"), Activity(0))) for one in run_dirs]


def test_every_task_has_the_metrics_of_its_last_evaluation(ranks: RankServer, tmp_path: Path) -> None:
    base = make_base(tmp_path, "dense")
    runs = {task: write_run(made(task, tmp_path, base), tmp_path / task) for task in ROWS}
    (codes,) = ranks.run(train_all, world_size=1, run_dirs=[str(run) for run in runs.values()])
    assert set(codes) == {0}
    folders = {task: tmp_path / f"{task}-evaluation" for task in runs}
    for task, run in runs.items():
        recipe = evaluation_recipe(trained_recipe(run, checkpoint=None), [], task=None)
        folders[task].mkdir()
        prepared(recipe, folders[task], target=run)
    (codes,) = ranks.run(evaluate_all, world_size=1, run_dirs=[str(folder) for folder in folders.values()])
    assert set(codes) == {0}
    for task, run in runs.items():
        found = json.loads((folders[task] / "evaluation.json").read_text())
        last = {k.removeprefix("eval_"): v for k, v in metrics(run, "eval")[-1].items() if k.startswith("eval_")}
        measured = {name: value for name, value in found["metrics"].items() if value is not None}
        assert found["task"] == task and {"loss"} < measured.keys() <= last.keys(), task
        declared = evaluation_metrics(trained_recipe(run, checkpoint=None))
        assert declared is not None and found["metrics"].keys() == {*declared.names}, task
        assert measured == pytest.approx({name: last[name] for name in measured}, rel=1e-5, abs=1e-6), task
