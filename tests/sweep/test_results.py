"""Finding a sweep's folder, and what its last lines say, without Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.sweep.results import Result, ranked, results_in, sweeps_folder
from megabatch.sweep.results_text import results_text


def _sweep(folder: Path, **points: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"schema_version": 1, "points": points}))
    return folder


def test_a_sweep_is_found_beneath_what_people_type(tmp_path: Path) -> None:
    one = _sweep(tmp_path / "megatron_output" / "model" / "layouts")
    assert sweeps_folder(one) == sweeps_folder(one.parent) == sweeps_folder(one.parent.parent) == one
    _sweep(one.parent / "other")
    assert sweeps_folder(one) == one
    with pytest.raises(LaunchError, match=r"holds 2 sweeps; name one: .*layouts"):
        sweeps_folder(one.parent)
    with pytest.raises(LaunchError, match="holds no sweep: there is no sweep"):
        sweeps_folder(tmp_path / "nothing")


def test_losses_are_means_over_the_last_ten_steps_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = _sweep(tmp_path / "s", a={"values": {"training.seed": 1}, "pruned": None})
    lines = [
        {"kind": "train", "step": i, "loss_sum": i, "loss_count": 1 + i % 2, "tokens_per_s": i} for i in range(30)
    ]
    lines.insert(25, {"kind": "eval", "step": 24, "eval_loss": 0.5})
    (sweep / "a").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (sweep / "a" / "metrics.jsonl").write_text(text)
    (result,) = results_in(sweep)
    assert result.metrics == {"step": 29, "tokens_per_s": 29, "eval_loss": 0.5, "loss": sum(range(20, 30)) / 15}
    assert result.step == 29
    assert result.state == "not_submitted"


def test_long_metrics_are_read_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = _sweep(tmp_path / "s", a={"values": {}, "pruned": None})
    (sweep / "a").mkdir()
    line = {"kind": "train", "loss_sum": 1.0, "loss_count": 1, "filler": "x" * 200}
    with open(sweep / "a" / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line | {"step": step}) + "\n" for step in range(3000))
    (result,) = results_in(sweep)
    assert result.step == 2999 and result.metrics["loss"] == 1.0


def test_the_best_comes_first_and_what_is_not_done_below() -> None:
    def result(name: str, state: str, **figures: float) -> Result:
        return Result(name=name, run=Path(name), values={}, state=state, metrics=figures)

    results = [
        result("pruned", "pruned"),
        result("failed", "failed", tokens_per_s=99),
        result("slow", "completed", tokens_per_s=1, loss=1.0),
        result("unknown", "completed"),
        result("waits", "pending"),
        result("fast", "completed", tokens_per_s=2, loss=2.0),
        result("runs", "running", tokens_per_s=5),
    ]
    rest = ["unknown", "runs", "waits", "failed", "pruned"]
    assert [one.name for one in ranked(results, by="tokens_per_s")] == ["fast", "slow", *rest]
    assert [one.name for one in ranked(results, by="loss")] == ["slow", "fast", *rest]


def test_any_metric_ranks_in_its_own_direction_and_an_unknown_one_is_named() -> None:
    results = [
        Result(name=name, run=Path(name), values={}, state="completed", metrics={"eval_reward": up, "kl": down})
        for name, up, down in (("a", 0.25, 0.5), ("b", 0.75, 0.5), ("c", 0.5, 0.125))
    ]
    assert [one.name for one in ranked(results, by="eval_reward")] == ["b", "c", "a"]
    assert [one.name for one in ranked(results, by="kl")] == ["c", "a", "b"]
    with pytest.raises(LaunchError, match="--by eval_rewards: no run of this sweep logs it; nearest: eval_reward"):
        ranked(results, by="eval_rewards")


def test_means_over_seeds_have_their_confidence_interval() -> None:
    """By hand: 1, 2, 3 have mean 2 and deviation 1, and Student's t of two degrees of freedom is 4.303."""
    losses = {("dapo", 1): 3.0, ("dapo", 2): 2.0, ("dapo", 3): 1.0, ("grpo", 1): 0.5}
    results = [
        Result(
            name=f"{loss}{seed}",
            run=Path("x"),
            values={"grpo.loss_type": loss, "training.seed": seed},
            state="completed",
            metrics={"eval_loss": value},
        )
        for (loss, seed), value in losses.items()
    ]
    unfinished = Result(
        name="u",
        run=Path("x"),
        values={"grpo.loss_type": "grpo", "training.seed": 2},
        state="running",
        metrics={"eval_loss": 9.0},
    )
    below = results_text([*results, unfinished], by="eval_loss").split("\n\n")[1].splitlines()
    assert [line.split() for line in below[1:]] == [
        ["runs", "loss", "eval_loss"],
        ["1", "grpo", "0.5", "-"],
        ["3", "dapo", "2", "±", "2.484"],
    ]
