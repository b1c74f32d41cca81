"""Runs that read their data while they train: equal at every layout, and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, metrics, recipe, train, with_fields, write_dataset, write_run

from megabatch import Recipe
from megabatch.run_directory import ExitCode

SAMPLES = 300
"""Three blocks of rows, the last one short."""


def train_or_refuse(run_dir: str, stop_after: int | None = None) -> tuple[int, str]:
    """Exit code of a rank, and what it was refused for."""
    from megabatch.errors import MegabatchError
    from megabatch.trainer import failures

    try:
        return train(run_dir, stop_after), ""
    except MegabatchError as error:
        return int(failures.report(error)), str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("streaming")
    write_dataset(found / "train.jsonl", samples=SAMPLES)
    write_dataset(found / "validation.jsonl", samples=7, seed=1)
    return found


def streamed(folder: Path, **groups: dict[str, Any]) -> Recipe:
    made = recipe(folder, "qwen2", data={"streaming": True, "shuffle_buffer_size": 100, "max_length": 64})
    return with_fields(made, **groups)


@pytest.fixture(scope="module")
def reference(ranks: RankServer, folder: Path) -> Path:
    run = write_run(streamed(folder), folder / "reference")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [ExitCode.DONE]
    return run


@pytest.mark.parametrize(
    ("layout", "world_size", "groups"),
    [
        ("threads", 1, {"data": {"num_workers": 2, "dataset_num_proc": 2}}),
        ("dp2", 2, {"data": {"num_workers": 1}}),
        ("tp2_sp_micro4", 2, {"batch": {"micro_batch_size": 4},
                              "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
        ("cp2", 2, {"parallel": {"context_parallel_size": 2}}),
        ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    ],
)  # fmt: skip
def test_a_layout_changes_no_number(
    layout: str, world_size: int, groups: dict[str, Any], ranks: RankServer, folder: Path, reference: Path
) -> None:
    run = write_run(streamed(folder, **groups, resources={"tasks_per_node": world_size}), folder / layout)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {ExitCode.DONE}
    assert [line["tokens"] for line in metrics(run)] == [line["tokens"] for line in metrics(reference)]
    for (_, loss, norm), (_, reference_loss, reference_norm) in zip(curve(run), curve(reference), strict=True):
        assert (loss, norm) == (pytest.approx(reference_loss, rel=1e-5), pytest.approx(reference_norm, rel=1e-5))
    assert [loss for _, loss in evaluations(run)] == pytest.approx([x for _, x in evaluations(reference)], rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_goes_on_in_the_middle_of_a_block(packing: bool, ranks: RankServer, folder: Path) -> None:
    groups: dict[str, Any] = {
        "data": {"packing": packing, "num_workers": 2},
        "batch": {"global_batch_size": 24, "micro_batch_size": 4},
    }
    groups |= {"model": {"num_layers": 1}, "evaluation": {"eval_interval": 16}}
    steps = {"train_iters": 16, "seed": 5}  # 13 steps an epoch without packing
    names = [f"{name}-{packing}" for name in ("whole", "cut")]
    whole, cut = (write_run(streamed(folder, **groups, training=steps), folder / name) for name in names)
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    for stop in (3, 11):
        assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=stop) == [ExitCode.REQUEUE]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [ExitCode.DONE]
    assert curve(cut) == curve(whole)
    assert len(list((whole / "cache").glob("*/ids.bin"))) == 1, "the validation data alone is in a cache"
    assert metrics(whole)[-1]["epoch"] >= 1


OWN = """
def tidy(row):
    numbers = row["query"].count("+")
    row["response"] += f" {numbers}"
    return None if numbers == 1 else [row, row] if numbers == 2 else row
"""


def test_a_mixture_of_own_rows_goes_on_at_another_layout(ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "few.jsonl", samples=40, seed=2)
    (tmp_path / "own.py").write_text(OWN)
    data = {
        "dataset": [str(tmp_path / "few.jsonl"), str(folder / "train.jsonl")],
        "interleave_prob": [0.3, 0.7],
        "stopping_strategy": "all_exhausted",
        "preprocess": f"{tmp_path / 'own.py'}:tidy",
        "num_workers": 1,
    }
    tp2, pp2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    small: dict[str, Any] = {"model": {"num_layers": 2}, "evaluation": {"eval_iters": 0}}
    batch = {"global_batch_size": 64, "micro_batch_size": 4}
    made = streamed(folder, data=data, training={"train_iters": 6}, batch=batch, **small)
    whole = write_run(made, tmp_path / "whole")
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    cut = tmp_path / "cut"
    write_run(with_fields(made, parallel=pp2, resources={"tasks_per_node": 2}), cut)
    assert set(ranks.run(train, world_size=2, run_dir=str(cut), stop_after=3)) == {ExitCode.REQUEUE}
    write_run(with_fields(made, parallel=tp2, resources={"tasks_per_node": 2}), cut)
    assert set(ranks.run(train, world_size=2, run_dir=str(cut))) == {ExitCode.DONE}
    assert [line["tokens"] for line in metrics(cut)] == [line["tokens"] for line in metrics(whole)]
    for one, other in zip(curve(cut), curve(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_place_in_another_stream_is_not_resumed(ranks: RankServer, folder: Path) -> None:
    run = write_run(streamed(folder), folder / "other")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [ExitCode.REQUEUE]
    write_run(streamed(folder, data={"shuffle_buffer_size": 200}), run)
    [(code, error)] = ranks.run(train_or_refuse, world_size=1, run_dir=str(run))
    assert (code, len(metrics(run))) == (ExitCode.CONFIG, 2)
    assert "place in the stream belongs to other files" in error
    write_run(streamed(folder, data={"streaming": False}), run)
    [(code, error)] = ranks.run(train_or_refuse, world_size=1, run_dir=str(run))
    assert code == ExitCode.CONFIG and "the checkpoint's data cursor belongs to other samples" in error


def test_a_faulty_row_ends_the_run_on_every_rank(
    ranks: RankServer, folder: Path, reference: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text((folder / "train.jsonl").read_text() + "no json\n")
    tokenizer = {"tokenizer": str(reference / "model")}  # to train one, all rows would be read first
    made = streamed(folder, model=tokenizer, data={"dataset": [str(broken)], "num_workers": 1},
                    batch={"global_batch_size": 64}, training={"train_iters": 20},
                    resources={"tasks_per_node": 2})  # fmt: skip
    run = write_run(made, tmp_path / "run")
    outcomes = ranks.run(train_or_refuse, world_size=2, run_dir=str(run))
    assert {code for code, _ in outcomes} == {ExitCode.CONFIG}
    assert all("broken.jsonl:301: not valid JSON" in error for _, error in outcomes)
    assert metrics(run), "the rows before it were learned"
