"""`megabatch replay`: an update of a run on several ranks, repeated on one process from the ledger."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, with_fields, write_run
from test_grpo_runs import grpo_recipe

from megabatch.cli import replay as command
from megabatch.cli.command import main
from megabatch.config.run import RunConfig
from megabatch.errors import CheckpointError, ConfigError, RewardError
from megabatch.ledger.reader import Reader
from megabatch.ledger.segments import segments
from megabatch.ledger.writer import Ledger
from megabatch.trainer import replay

EVERY_STEP = {"save_interval": 1, "async_save": False}


def moe_recipe(folder: Path, **grpo: Any) -> Any:
    """tp2, two packs a micro-batch, for balancing losses that depend on them, and experts that are replayed."""
    made = grpo_recipe(folder, world_size=2, grpo={"router_replay_mode": "R2", **grpo})
    other = recipe(folder, "qwen3_moe")
    return with_fields(
        replace(made, model=other.model, moe=replace(other.moe, moe_aux_loss_coeff=0.01)),
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        batch={"micro_batch_size": 2, "global_batch_size": 8},
        checkpoint=EVERY_STEP,
        evaluation={"eval_iters": 0},
        training={"train_iters": 3},
    )


def repeated(run_dir: str, steps: list[int]) -> list[dict[str, float | None]]:
    """What the program prints, for several steps in one process."""
    found = []
    for step in steps:
        run = RunConfig.load(Path(run_dir) / "run.json")
        result = replay.replayed(run, replay.in_one_process(run, gpus=0), step)
        found.append(replay.numbers(result))
    return found


@pytest.fixture(scope="module")
def run(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    made = write_run(moe_recipe(folder), folder / "run")
    assert set(ranks.run(train, world_size=2, run_dir=str(made))) == {0}
    return made


@pytest.fixture
def here(ranks: RankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's work in a process that has imported torch already."""

    def in_server(folder: Path, step: int) -> dict[str, float | None]:
        found: dict[str, float | None] = ranks.run(repeated, world_size=1, run_dir=str(folder), steps=[step])[0][0]
        return found

    monkeypatch.setattr(command, "_repeated", in_server)


def test_every_update_of_two_ranks_is_repeated_by_one(ranks: RankServer, run: Path) -> None:
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    found = ranks.run(repeated, world_size=1, run_dir=str(run), steps=[1, 2, 3])[0]
    config = RunConfig.load(run / "run.json")
    for logged, numbers in zip(metrics(run), found, strict=True):
        lines = command.compared(logged, numbers, config, tolerance=None)
        assert [line.name for line in lines[:2]] == ["loss", "grad_norm"] and {"kl", "ratio"} <= set(numbers)
        assert all(line.passes for line in lines), lines
        assert all(line.difference < 1e-4 for line in lines if line.name in ("ratio", "kl")), lines
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before, "the run's folder is the run's"


def test_a_first_step_without_a_pass_beforehand_is_repeated(ranks: RankServer, run: Path) -> None:
    """Its own log-probabilities are the old ones, then as in the run; those of the round's other step are recorded."""
    made = with_fields(
        grpo_recipe(run.parent, world_size=2),
        checkpoint=EVERY_STEP,
        evaluation={"eval_iters": 0},
        training={"train_iters": 3},
    )
    own = write_run(made, run.parent / "own")
    assert set(ranks.run(train, world_size=2, run_dir=str(own))) == {0}
    recorded = [{"old" in record.columns for record in Reader(own / "ledger").records(step)} for step in (1, 2, 3)]
    assert recorded == [{False}, {True}, {False}]
    config = RunConfig.load(own / "run.json")
    found = ranks.run(repeated, world_size=1, run_dir=str(own), steps=[1, 2, 3])[0]
    for logged, numbers in zip(metrics(own), found, strict=True):
        lines = command.compared(logged, numbers, config, tolerance=None)
        assert all(line.passes for line in lines), lines
        assert (numbers["ratio"] == 1) == (logged["step"] != 2)


def test_a_step_that_learned_nothing_is_repeated(ranks: RankServer, tmp_path: Path) -> None:
    """Completions that are all cut off, by a model that ends none, are masked."""
    made = grpo_recipe(tmp_path, world_size=1, grpo={"overlong_filter": True, "loss_type": "bnpo"})
    made = with_fields(made, training={"train_iters": 1}, checkpoint=EVERY_STEP, rollout={"max_completion_length": 1})
    run = write_run(made, tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    (numbers,) = ranks.run(repeated, world_size=1, run_dir=str(run), steps=[1])[0]
    (logged,) = metrics(run)
    assert logged["loss"] is None and numbers["loss"] is None
    lines = command.compared(logged, numbers, RunConfig.load(run / "run.json"), tolerance=None)
    assert lines[0].name == "grad_norm" and all(line.passes for line in lines), lines


@pytest.mark.parametrize(
    ("dtype", "reduced"),
    [("float32", {}), ("bfloat16", {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16"})],
)
def test_an_optimizer_in_host_memory_is_repeated_without_it(
    dtype: str, reduced: dict[str, Any], ranks: RankServer, run: Path, tmp_path: Path
) -> None:
    """One process has no distributed optimizer, which offloading and gradients in bfloat16 need."""
    made = with_fields(
        moe_recipe(run.parent), model={"torch_dtype": dtype}, optimizer={"optimizer_cpu_offload": True, **reduced}
    )
    offloaded = write_run(made, tmp_path / "run")
    assert set(ranks.run(train, world_size=2, run_dir=str(offloaded))) == {0}
    config = RunConfig.load(offloaded / "run.json")
    found = ranks.run(repeated, world_size=1, run_dir=str(offloaded), steps=[1, 3])[0]
    for logged, numbers in zip(metrics(offloaded)[::2], found, strict=True):
        lines = command.compared(logged, numbers, config, tolerance=None)
        assert all(line.passes for line in lines), (logged["step"], lines)


def test_one_process_dispatches_without_deepep(ranks: RankServer, run: Path, tmp_path: Path) -> None:
    """The run's record says flex, whose results are those of alltoall; DeepEP exchanges between two ranks or more."""
    shutil.copytree(run, copy := tmp_path / "run")
    text = (copy / "run.json").read_text().replace(json.dumps(str(run)), json.dumps(str(copy)))
    record = json.loads(text)
    record["recipe"]["moe"] |= {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}
    (copy / "run.json").write_text(json.dumps(record))
    config = RunConfig.load(copy / "run.json")
    [numbers] = ranks.run(repeated, world_size=1, run_dir=str(copy), steps=[2])[0]
    assert all(line.passes for line in command.compared(metrics(run)[1], numbers, config, tolerance=None))


def test_dropout_of_data_parallel_ranks_is_drawn_again(ranks: RankServer, run: Path) -> None:
    """From what each rank's generators were in the checkpoint before, or from the seed."""
    made = grpo_recipe(run.parent, world_size=2, grpo={"steps_per_generation": 1, "beta": 0.0})
    made = with_fields(
        made,
        model={"attention_dropout": 0.1, "hidden_dropout": 0.1},
        checkpoint=EVERY_STEP,
        evaluation={"eval_iters": 0},
        training={"train_iters": 3},
    )
    dropped = write_run(made, run.parent / "dropped")
    assert set(ranks.run(train, world_size=2, run_dir=str(dropped))) == {0}
    config = RunConfig.load(dropped / "run.json")
    found = ranks.run(repeated, world_size=1, run_dir=str(dropped), steps=[1, 2, 3])[0]
    for logged, numbers in zip(metrics(dropped), found, strict=True):
        lines = command.compared(logged, numbers, config, tolerance=None)
        assert all(line.passes for line in lines), (logged["step"], lines)
    shutil.rmtree(dropped / "checkpoints" / "step_00000001")
    with pytest.raises(CheckpointError, match=r"hidden_dropout=0.1: step 2 is the run's first, and no checkpoint has"):
        replay.replayed(config, config, 2)


def test_the_command_compares_in_a_process_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--step", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passes"] and [line["name"] for line in said["numbers"][:2]] == ["loss", "grad_norm"]
    assert all(line["difference"] <= line["allowed"] == 1e-5 for line in said["numbers"][:2])


def test_other_completions_are_another_update(
    here: None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    text = (copy / "run.json").read_text().replace(json.dumps(str(run)), json.dumps(str(copy)))
    (copy / "run.json").write_text(text)
    records = list(Reader(copy / "ledger").records(3))
    records[0] = replace(records[0], advantage=records[0].advantage + 1e-2)
    Ledger(copy / "ledger", max_bytes=2**30).write(3, records)
    assert main(["replay", str(copy), "--step", "3"]) == 1
    assert "NOT within 1e-05" in capsys.readouterr().out
    assert main(["replay", str(copy), "--step", "3", "--tolerance", "0.5"]) == 0
    assert "within 5e-01" in capsys.readouterr().out


def test_what_cannot_be_replayed_says_what_can(here: None, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000001")
    with pytest.raises(CheckpointError, match=r"step_00000001 does not exist; the nearest .*: 1, 3"):
        command.replay(copy, step=2, tolerance=None, as_json=False)
    with pytest.raises(RewardError, match="step 9 is not in the ledger, which has steps 1 to 3"):
        command.replay(copy, step=9, tolerance=None, as_json=False)
    shutil.rmtree(copy / "checkpoints" / "step_00000002" / "mcore")
    with pytest.raises(CheckpointError, match=r"step_00000002 has no state to resume from; .*: 1$"):
        command.replay(copy, step=3, tolerance=None, as_json=False)


def test_a_run_that_cannot_be_repeated_is_refused(run: Path) -> None:
    config = RunConfig.load(run / "run.json")
    recipe = replace(config.recipe, tuner=replace(config.recipe.tuner, tuner_type="lora", lora_dropout=0.1))
    with pytest.raises(ConfigError, match=r"tuner.lora_dropout=0.1: ranks that share a model or its rows drew"):
        replay.in_one_process(replace(config, recipe=recipe), gpus=0)
    layout = replace(config.layout, tp=1, dp=2)
    recipe = with_fields(recipe, checkpoint={"no_save_rng": True})
    with pytest.raises(ConfigError, match=r"tuner.lora_dropout=0.1: checkpoint.no_save_rng=True left out"):
        replay.in_one_process(replace(config, recipe=recipe, layout=layout), gpus=0)


def test_the_ledger_stays_small(run: Path) -> None:
    records = [record for step in (1, 2, 3) for record in Reader(run / "ledger").records(step)]
    assert {tuple(record.columns) for record in records} == {("old", "reference")}
    routes = sum(len(record.routes.data) for record in records if record.routes is not None)
    tokens = sum(len(record.prompt_ids) + len(record.ids) for record in records)
    assert routes == tokens * 4 * 2, "a byte for each token, layer and expert"
    assert sum(len(file.read_bytes()) for file in segments(run / "ledger")) < 600 * len(records) + routes
