"""Distillation on the trainer: a teacher of another shape, and the same numbers at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rank_server import RankServer
from runs import SHAPE, curve, metrics, recipe, train, write_run

from megabatch import Recipe
from megabatch.data.tokens.tokenizer import train_bpe

GROUPS: dict[str, dict[str, Any]] = {
    "rlhf": {"rlhf_type": "gkd"},
    "gkd": {"gkd_logits_topk": 7, "sft_alpha": 0.1, "lmbda": 0.0, "beta": 0.3},
    "learning_rate": {"lr": 0.003, "min_lr": 0.003},
    "optimizer": {"adam_eps": 1e-3, "weight_decay": 0.0},
    "training": {"train_iters": 3},
    "batch": {"global_batch_size": 4},
    "evaluation": {"eval_interval": 3},
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_sp": {"parallel": TP},
    "pp2_vpp2": {"parallel": VPP},
    "cp2": {"parallel": {"context_parallel_size": 2}},
    "dp2_lora": {"tuner": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}},
}  # fmt: skip


def write_teacher(folder: Path, *, vocab_size: int = SHAPE["padded_vocab_size"]) -> Path:
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    return folder


def made(folder: Path, world_size: int, groups: dict[str, dict[str, Any]]) -> Recipe:
    every = {name: {**GROUPS.get(name, {}), **groups.get(name, {})} for name in {*GROUPS, *groups}}
    every["gkd"] = {"teacher_model": str(folder / "teacher"), **every["gkd"]}
    return replace(recipe(folder, "qwen2", **every, resources={"tasks_per_node": world_size}), task="rlhf")


def trained(ranks: RankServer, folder: Path, name: str, world: int, groups: dict[str, Any]) -> Path:
    run = write_run(made(folder, world, groups), folder / name)
    assert set(ranks.run(train, world_size=world, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gkd")
    write_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def references(ranks: RankServer, folder: Path) -> dict[bool, Path]:
    """Runs of one process, with and without LoRA."""
    return {
        False: trained(ranks, folder, "full", 1, {}),
        True: trained(ranks, folder, "lora", 1, LAYOUTS["dp2_lora"]),
    }


def test_a_student_comes_nearer_to_its_teacher(references: dict[bool, Path]) -> None:
    start, end = metrics(references[False], "eval")
    assert 0 < end["eval_divergence"] < start["eval_divergence"]
    assert start["eval_loss"] == pytest.approx(start["eval_divergence"] + 0.1 * start["eval_nll_loss"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(
    layout: str, ranks: RankServer, folder: Path, references: dict[bool, Path]
) -> None:
    run, reference = trained(ranks, folder, layout, 2, LAYOUTS[layout]), references["lora" in layout]
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(reference, kind), strict=True):
            for name in expected:
                if name.removeprefix("eval_") in ("loss", "divergence", "nll_loss", "grad_norm"):
                    near = pytest.approx(expected[name], rel=2e-5, abs=2e-6)
                    assert found[name] == near, (kind, found["step"], name)


def test_a_run_that_was_stopped_goes_on_exactly(ranks: RankServer, folder: Path, references: dict[bool, Path]) -> None:
    run = write_run(made(folder, 1, {}), folder / "cut")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    assert curve(run) == curve(references[False])


def test_a_teacher_with_another_vocabulary_is_refused(ranks: RankServer, folder: Path) -> None:
    write_teacher(folder / "other", vocab_size=2000)
    run = write_run(made(folder, 1, {"gkd": {**GROUPS["gkd"], "teacher_model": str(folder / "other")}}), folder / "no")
    with pytest.raises(RuntimeError, match=r"has 2,000 tokens and the student 304: distillation compares tokens"):
        ranks.run(train, world_size=1, run_dir=str(run))
