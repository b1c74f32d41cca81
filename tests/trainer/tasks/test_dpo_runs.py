"""DPO and KTO on the trainer: evaluations, stored references, exact resumption. TRL's numbers are in `objectives`,
every layout's in `aligned`."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run

from megabatch import Recipe

NAMES = ("loss", "kl", "grad_norm", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
         "rewards/margins", "logps/chosen", "logps/rejected")  # fmt: skip
GROUPS: dict[str, dict[str, Any]] = {
    "learning_rate": {"lr": 0.02, "min_lr": 0.02},
    "optimizer": {"adam_eps": 1e-3, "weight_decay": 0.0},
    "training": {"train_iters": 3},
    "batch": {"global_batch_size": 4},
    "checkpoint": {"no_save_optim": True},
    "evaluation": {"eval_interval": 3},
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
DPO = {"dpo": {"beta": 0.5, "loss_type": ("sigmoid", "aot"), "rpo_alpha": 0.3}}
PRECOMPUTED = {"precompute_ref_log_probs": True}
ALONE = {"share_prompts": False}
LAYOUTS: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "pp2_vpp2": ("qwen2", 2, {"parallel": VPP}),
    "dp2": ("qwen2", 2, {}),  # and 3 pairs to evaluate on: a micro-batch is without samples
    "packed_cp2": ("packed", 2, {"parallel": {"context_parallel_size": 2}}),
    "kto_pp2_vpp2": ("kto", 2, {"parallel": VPP, "batch": {"global_batch_size": 4, "micro_batch_size": 2}}),
    # and the log-probabilities of 36 samples are not a rank's own
    "precomputed_dp2_ref_pp2": ("qwen2", 2, {"rlhf": {**PRECOMPUTED, "ref_pipeline_model_parallel_size": 2}}),
    "lora_precomputed_tp2": ("lora", 2, {"parallel": TP, "rlhf": {**PRECOMPUTED, "precompute_ref_batch_size": 3}}),
    "kto_precomputed_pp2_vpp2": ("kto", 2, {"parallel": VPP, "rlhf": {**PRECOMPUTED, "rlhf_type": "kto"}}),
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "qwen2": ("qwen2", {**DPO, "rlhf": ALONE}),
    "packed": ("qwen2", {**DPO, "data": {"packing": True, "packing_length": 160}, "batch": {"global_batch_size": 2}}),
    "lora": ("qwen2", {**DPO, "tuner": LORA}),
    "kto": ("qwen2", {"rlhf": {"rlhf_type": "kto"}, "kto": {"beta": 0.5, "undesirable_weight": 0.7}}),
}
"""Runs of one process with which layouts must agree: model, groups. Where these have each prompt twice, the layouts
share it."""


def write_pairs(path: Path, *, pairs: int, seed: int) -> Path:
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(pairs):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            wrong = f"It is {a - b}" + " I think" * draw.randint(0, 3)
            row = {"query": f"{a} + {b}?", "response": str(a + b), "rejected_response": wrong}
            file.write(
                json.dumps(row if number % 2 else {"prompt": f"{a}", "chosen": f"{b}", "rejected": "no"}) + "\n"
            )
    return path


def made(folder: Path, kind: str, world_size: int, groups: dict[str, dict[str, Any]]) -> Recipe:
    model, own = KINDS[kind]
    data = {"dataset": [str(folder / "train.jsonl")], "val_dataset": [str(folder / "validation.jsonl")]}
    every = {name: {**GROUPS.get(name, {}), **own.get(name, {}), **groups.get(name, {})}
             for name in {*GROUPS, *own, *groups}}  # fmt: skip
    resources = {"tasks_per_node": world_size}
    found = recipe(folder, model, **{**every, "data": {**data, **every.get("data", {})}, "resources": resources})
    return replace(found, task="rlhf")


def trained(ranks: RankServer, folder: Path, name: str, kind: str, world: int, groups: dict[str, Any]) -> Path:
    run = write_run(made(folder, kind, world, groups), folder / name)
    assert set(ranks.run(train, world_size=world, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_pairs(folder / "train.jsonl", pairs=18, seed=1)
    write_pairs(folder / "validation.jsonl", pairs=3, seed=2)
    return folder


@pytest.fixture(scope="module")
def references(ranks: RankServer, folder: Path) -> dict[str, Path]:
    return {kind: trained(ranks, folder, kind, kind, 1, {}) for kind in KINDS}


def test_the_first_step_compares_equal_models(references: dict[str, Path]) -> None:
    for kind, run in references.items():
        first, *_, last = metrics(run)
        if kind == "kto":
            assert first["loss"] == pytest.approx((0.5 + 0.7 * 0.5) / 2, rel=1e-5)
            assert (first["kl"], first["loss_count"]) == (pytest.approx(0, abs=1e-5), 8)
            assert metrics(run, "eval")[-1]["eval_pair_accuracy"] in (0, 1 / 3, 2 / 3, 1)
            continue
        assert first["loss"] == pytest.approx(2 * math.log(2) + 0.3 * first["nll_loss"], rel=1e-6)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert abs(last["rewards/margins"]) > 1e-3
        evaluated = metrics(run, "eval")
        assert [line["eval_rewards/margins_count"] for line in evaluated] == [3, 3]
        assert (
            evaluated[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6) != evaluated[1]["eval_rewards/margins"]
        )
        assert evaluated[1]["eval_rewards/accuracies"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, folder: Path, references: dict[str, Path]) -> None:
    kind, world_size, groups = LAYOUTS[layout]
    groups = {**groups, "rlhf": {"share_prompts": None, **groups.get("rlhf", {})}}
    run = trained(ranks, folder, layout, kind, world_size, groups)
    for line in ("train", "eval"):
        for found, expected in zip(metrics(run, line), metrics(references[kind], line), strict=True):
            names = [name for name in expected if name.removeprefix("eval_") in NAMES]
            assert len(names) >= len(NAMES) - 2
            for name in names:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-5), (line, found["step"], name)
            for name in expected.keys() & {"loss_count", "eval_loss_count", "samples"}:
                assert found[name] == expected[name], (line, found["step"], name)
            if line == "eval" and found["step"] > 0:  # before, policy and reference are equal but for rounding
                assert found.get("eval_pair_accuracy") == expected.get("eval_pair_accuracy")
            if line == "train":
                assert (found["tokens"] < expected["tokens"]) == (kind.startswith("qwen")), layout


@pytest.mark.parametrize("kind", ["lora", "kto"])
def test_a_run_that_was_stopped_goes_on_exactly(
    kind: str, ranks: RankServer, folder: Path, references: dict[str, Path]
) -> None:
    run = cut(made(folder, kind, 1, SAVED), folder / f"{kind}, cut", ranks)
    assert curve(run) == curve(references[kind])
    names = [name for name in NAMES if name in metrics(references[kind])[0] and name != "grad_norm"]
    assert [[m[n] for n in names] for m in metrics(run)] == [[m[n] for n in names] for m in metrics(references[kind])]


def test_stored_log_probabilities_are_computed_once(ranks: RankServer, folder: Path) -> None:
    """Dropout would show a reference that is built in one attempt alone."""
    groups = {**SAVED, "rlhf": {**PRECOMPUTED, "rlhf_type": "kto"}, "model": {"hidden_dropout": 0.2}}
    whole = trained(ranks, folder, "stored, whole", "kto", 1, groups)
    run = cut(made(folder, "kto", 1, groups), folder / "stored, cut", ranks)
    assert metrics(run)[-1]["loss"] == metrics(whole)[-1]["loss"] and curve(run) == curve(whole)
    stored = sorted((run / "cache" / "reference").iterdir())
    assert len(stored) == 2, "training and validation data"
    before = [path.stat().st_mtime_ns for path in stored]
    again = write_run(made(folder, "kto", 1, groups), folder / "stored, again")
    shutil.copytree(run / "cache", again / "cache", copy_function=os.link)
    assert ranks.run(train, world_size=1, run_dir=str(again)) == [0]
    assert curve(again) == curve(whole)
    assert [path.stat().st_mtime_ns for path in stored] == before


def test_log_probabilities_of_the_data(ranks: RankServer, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    given = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -5.5} for row in rows]
    path = folder / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    groups = {
        "rlhf": PRECOMPUTED,
        "data": {"dataset": [str(path)], "val_dataset": []},
        "training": {"train_iters": 1},
        "evaluation": {"eval_interval": None},
    }
    run = trained(ranks, folder, "given", "qwen2", 1, groups)
    (first,) = metrics(run)
    assert first["rewards/chosen"] == pytest.approx(0.5 * (first["logps/chosen"] + 3.0), rel=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0.5 * (first["logps/rejected"] + 5.5), rel=1e-5)
    assert not (run / "cache" / "reference").exists()


SAVED: dict[str, dict[str, Any]] = {"checkpoint": {"no_save_optim": False}}


def cut(recipe: Recipe, folder: Path, ranks: RankServer) -> Path:
    """The run of a recipe, stopped after two of its three steps."""
    run = write_run(recipe, folder)
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run
