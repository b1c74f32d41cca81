"""Whole GRPO runs at every layout: the completions, rewards and curve of one process, and an exact resume in a round.

Each world is started once for all of its layouts. Every round begins with an update of the engines, whose proof is in
the metrics.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_server import RankServer
from runs import metrics, recipe, train, with_fields, write_run

from megabatch import Grpo, Rlhf, Rollout
from megabatch.ledger.reader import Reader
from megabatch.run_directory import ExitCode, RunDirectory

REWARD = """
def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]
"""
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
LORA = {"tuner": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]}}
IN_ONE_ROW = {"batch": {"micro_batch_size": 2}}
"""Two completions of different prompts end to end, without padding; elsewhere each is a micro-batch of its own."""
ALONE: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "dense": ("qwen3", {}),
    "dense_lora": ("qwen3", LORA),
    "experts": ("qwen3_moe", {}),
    "experts_lora": ("qwen3_moe", LORA),
}
LAYOUTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "dp2": ("dense", {}),
    "tp2_sp": ("dense", {"parallel": {**TP2, **SP}}),
    "pp2": ("dense", {"parallel": PP2}),
    "pp2_vpp2_packed": ("dense", {"parallel": {**PP2, "num_virtual_stages_per_pipeline_rank": 2}, **IN_ONE_ROW}),
    "cp2_packed": ("dense", {"parallel": CP2, **IN_ONE_ROW}),
    "tp2_sp_lora": ("dense_lora", {"parallel": {**TP2, **SP}}),
    "ep2": ("experts", {"parallel": {"expert_model_parallel_size": 2}}),
    "tp2_sp_etp2": ("experts", {"parallel": {**TP2, **SP, "expert_tensor_parallel_size": 2}}),
    "ep2_lora": ("experts_lora", {"parallel": {"expert_model_parallel_size": 2}}),
}
INFERRED = {"dp2": 8, "tp2_sp_lora": 4, "pp2_vpp2_packed": 3, "experts at once": 16}
"""Completions of a micro-batch where only log-probabilities are computed, if not as many as in training. A group then
shares its prompt there, if the number divides."""
SAVED, LAST = 3, 4
"""Steps with a checkpoint: the first is within the second round of two steps."""
RESUMED = ["dp2", "pp2_vpp2_packed", "cp2_packed", "tp2_sp_lora", "ep2"]


def trained(run_dirs: list[str], resumed: list[str]) -> None:
    """Trains all of them in one world. Args: resumed: those that then repeat their last step from their checkpoint."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for run_dir in run_dirs:
        assert train(run_dir) == ExitCode.DONE
    dist.barrier()
    if dist.get_rank() == 0:
        for run_dir in resumed:
            go_back(RunDirectory(Path(run_dir)))
    dist.barrier()
    for run_dir in resumed:
        assert train(run_dir) == ExitCode.DONE
    dist.destroy_process_group()


def go_back(run: RunDirectory) -> None:
    """As if the run had been killed in its last step; its metrics are kept beside."""
    shutil.rmtree(run.step(LAST))
    run.latest.write_text(f"{run.step(SAVED).name}\n")
    run.metrics.rename(whole(run.path))


def whole(run: Path) -> Path:
    return run / "whole.jsonl"


def made(folder: Path, name: str, kind: str, world_size: int, groups: dict[str, dict[str, Any]]) -> Path:
    model, own = ALONE[kind]
    base = recipe(
        folder,
        model,
        data={"max_length": 64},
        batch={"micro_batch_size": 1},
        evaluation={"eval_iters": 0},
        training={"train_iters": LAST},
        checkpoint={"save_interval": SAVED, "save_safetensors": False},
        resources={"tasks_per_node": world_size},
        rewards={"reward_workers": 1},
        **own,
    )
    whole_run = replace(
        with_fields(base, **groups),
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(
            reward_funcs=[f"{folder / 'reward.py'}:letters"],
            num_generations=2,
            steps_per_generation=2,
            infer_batch_size=INFERRED.get(name),
        ),
        rollout=Rollout(temperature=1.0, max_completion_length=8),
    )
    return write_run(whole_run, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("every-layout")
    (found / "reward.py").write_text(REWARD)
    return found


@pytest.fixture(scope="module")
def alone(ranks: RankServer, folder: Path) -> dict[str, Path]:
    found = {kind: made(folder, kind, kind, 1, {}) for kind in ALONE}
    found["packed"] = made(folder, "packed", "dense", 1, {"batch": {"micro_batch_size": 4}})
    found["experts at once"] = made(folder, "experts at once", "experts", 1, {})
    ranks.run(trained, world_size=1, run_dirs=[str(run) for run in found.values()], resumed=[])
    return found


@pytest.fixture(scope="module")
def on_two(ranks: RankServer, folder: Path) -> dict[str, Path]:
    found = {layout: made(folder, layout, kind, 2, groups) for layout, (kind, groups) in LAYOUTS.items()}
    names = {layout: str(run) for layout, run in found.items()}
    resumed = [names[layout] for layout in RESUMED]
    ranks.run(trained, world_size=2, run_dirs=list(names.values()), resumed=resumed, timeout_s=900)
    return found


def first_time(run: Path) -> list[dict[str, Any]]:
    """The lines of all steps, as they were before any was repeated."""
    if not whole(run).exists():
        return metrics(run)
    found = map(json.loads, whole(run).read_text(encoding="utf-8").splitlines())
    return [line for line in found if line["kind"] == "train"]


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, is_packed: bool) -> None:
    """Args: is_packed: completions in one row share their prompt, whose tokens are computed and counted once."""
    for line, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "kl", "reward", "reward_std", "advantage"):
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (line["step"], name)
        assert line["samples"] == other["samples"]
        assert line["tokens"] < other["tokens"] if is_packed else line["tokens"] == other["tokens"]


def completions(run: Path) -> list[tuple[str, list[int]]]:
    reader = Reader(run / "ledger")
    return [(record.key, list(record.ids)) for step in reader.steps for record in reader.records(step)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_completion_and_no_number(
    layout: str, alone: dict[str, Path], on_two: dict[str, Path]
) -> None:
    kind, run = LAYOUTS[layout][0], on_two[layout]
    close(first_time(run), metrics(alone[kind]), is_packed="packed" in layout)
    assert completions(run) == completions(alone[kind])
    assert len(completions(run)) == 8 * LAST


def test_completions_in_one_row_change_no_number(alone: dict[str, Path]) -> None:
    close(metrics(alone["packed"]), metrics(alone["dense"]), is_packed=True)
    assert completions(alone["packed"]) == completions(alone["dense"])


def test_larger_micro_batches_for_log_probabilities_change_no_number(alone: dict[str, Path]) -> None:
    close(metrics(alone["experts at once"]), metrics(alone["experts"]), is_packed=False)
    assert completions(alone["experts at once"]) == completions(alone["experts"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_get_the_weights_of_every_round(layout: str, on_two: dict[str, Path]) -> None:
    rounds = [line for line in first_time(on_two[layout]) if "sync_max_logp_difference" in line]
    assert [line["step"] for line in rounds] == [1, 3]
    for line in rounds:
        assert 0 < line["sync_max_logp_difference"] <= 1e-4


@pytest.mark.parametrize("layout", RESUMED)
def test_a_step_within_a_round_is_repeated_exactly(layout: str, on_two: dict[str, Path]) -> None:
    (again,), *_, last = metrics(on_two[layout]), *first_time(on_two[layout])
    assert again["step"] == last["step"] == LAST
    for name in ("loss", "grad_norm", "kl", "ratio", "reward", "staleness"):
        assert again[name] == last[name], name
