"""Other tasks than fine-tuning on a GPU: in fp32 the numbers of the CPU, in bf16 GRPO's rounds and an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_dpo_runs
import test_head_layouts
import test_reward_model
from cuda_runs import on_gpus, require_gpus, train_on
from rank_server import RankServer
from runs import curve, metrics, with_fields, write_run
from test_grpo_runs import grpo_recipe

from megabatch import Recipe

LOCAL = {"transformer_impl": "local"}
HALF = {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}


def _dpo(folder: Path, kind: str = "qwen2") -> Recipe:
    test_dpo_runs.write_pairs(folder / "train.jsonl", pairs=18, seed=1)
    test_dpo_runs.write_pairs(folder / "validation.jsonl", pairs=3, seed=2)
    return test_dpo_runs.made(folder, kind, 1, {})


def _kto(folder: Path) -> Recipe:
    return _dpo(folder, "kto")


def _reward_model(folder: Path) -> Recipe:
    test_reward_model.write_pairs(folder / "train.jsonl", count=24, seed=0)
    test_reward_model.write_pairs(folder / "validation.jsonl", count=5, seed=1)
    return test_reward_model.made(folder, 1)


def _classifier(folder: Path) -> Recipe:
    return test_head_layouts.made(folder, "qwen3_moe", 1, {})


TASKS = {"dpo": _dpo, "kto": _kto, "reward_model": _reward_model, "classifier": _classifier, "grpo": grpo_recipe}


@pytest.mark.parametrize("task", TASKS)
def test_fp32_metrics_are_those_of_the_cpu(task: str, gpus: RankServer, cpus: RankServer, tmp_path: Path) -> None:
    made = with_fields(TASKS[task](tmp_path), kernels=LOCAL)
    expected = train_on(cpus, write_run(made, tmp_path / "cpu"))
    found = train_on(gpus, write_run(on_gpus(made), tmp_path / "gpu"))
    for kind in ("train", "eval"):
        for mine, theirs in zip(metrics(found, kind), metrics(expected, kind), strict=True):
            names = _measured(theirs)
            close = {name: pytest.approx(theirs[name], rel=1e-3, abs=1e-4) for name in names}
            assert {name: mine.get(name) for name in names} == close, (kind, mine["step"])


def _measured(line: dict[str, Any]) -> list[str]:
    """Metrics of the batch, which have a count; without times, and how an engine's weights differ by rounding."""
    names = [name for name in line if f"{name}_count" in line and line[name] is not None]
    return [name for name in names if not name.endswith("_s") and "sync_" not in name]


def test_bfloat16_grpo_goes_on_within_a_round_bit_for_bit(gpus: RankServer, tmp_path: Path) -> None:
    groups = {"model": HALF, "training": {"deterministic_mode": True}, "kernels": LOCAL}
    made = on_gpus(grpo_recipe(tmp_path, **groups))
    whole = train_on(gpus, write_run(made, tmp_path / "whole"))
    lines = metrics(whole)
    assert lines[2]["sync_max_logp_difference"] < 0.5
    assert [line["ratio"] == pytest.approx(1, abs=2e-2) for line in lines[::2]] == [True, True]
    cut = write_run(made, tmp_path / "cut")
    train_on(gpus, cut, stop_after=3)
    train_on(gpus, cut)
    assert curve(cut) == curve(whole)
    assert [line["reward"] for line in metrics(cut)] == [line["reward"] for line in lines]


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp"])
def test_grpo_over_several_gpus(layout: str, gpus: RankServer, tmp_path: Path) -> None:
    require_gpus(2)
    parallel: dict[str, Any] = {} if layout == "dp2" else {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    alone = train_on(gpus, write_run(on_gpus(grpo_recipe(tmp_path, kernels=LOCAL)), tmp_path / "alone"))
    made = on_gpus(grpo_recipe(tmp_path, kernels=LOCAL), 2, parallel=parallel)
    split = train_on(gpus, write_run(made, tmp_path / "split"), world_size=2)
    for found, expected in zip(metrics(split)[:2], metrics(alone)[:2], strict=True):
        for name in ("reward", "loss", "kl"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (found["step"], name)
