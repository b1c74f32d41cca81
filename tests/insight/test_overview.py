"""Progress and goodput against numbers worked out by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megabatch.cli.status import status_table
from megabatch.insight.goodput import allocated_s, attempts_of, goodput, remaining_s
from megabatch.insight.overview import overview
from megabatch.insight.tail import MOST_BYTES, last_step
from megabatch.slurm.records import read_records

from .made_run import MadeRun


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def requeued(tmp_path: Path) -> MadeRun:
    """Held nodes for 100 + 60 s; took steps 1 to 20 for 2 s each, lost 11 to 20, and took 11 to 30 again."""
    run = MadeRun.at(tmp_path / "run")
    run.submitted(time=900)
    run.started(0, 1000)
    run.steps([(step, 2.0 * step) for step in range(1, 21)])
    run.ended(0, 70, 1100)
    run.started(1, 1140)
    run.steps([(step, 2.0 * step) for step in range(11, 31)])
    run.ended(1, 75, 1200)
    run.beat(time=1200, state="stopped", step=30, job_id="7", attempt=1)
    return run


def test_goodput_counts_the_final_historys_steps_once(requeued: MadeRun) -> None:
    (found,) = overview([requeued.files.path])
    # 30 steps of 2 s over 100 + 60 s; 8 GPUs for 160 s
    assert found.goodput == pytest.approx(60 / 160)
    assert found.allocated_gpu_h == pytest.approx(8 * 160 / 3600)
    assert (found.step, found.train_iters, found.attempts, found.gpus) == (30, 100, 2, 8)
    assert (found.loss, found.tokens_per_s) == (pytest.approx(1 / 3), 500.0)
    assert found.eta_s is None, "it does not run"


def test_nodes_that_its_job_runs_without(requeued: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    requeued.bad_node("n3", "link")
    requeued.bad_node("n4", "ecc", job_id="6")
    (found,) = overview([requeued.files.path])
    assert [(bad["node"], bad["check"]) for bad in found.plain()["bad_nodes"]] == [("n3", "link")]  # type: ignore[attr-defined]
    assert status_table([found]).endswith("exit code 75 (saved); without n3 (link)")


def test_the_time_left_takes_what_requeues_cost_so_far(requeued: MadeRun) -> None:
    attempts = attempts_of(read_records(requeued.files), last_sign=lambda _: 1200, running=False)
    step = last_step(requeued.files.metrics)
    # 70 steps at 2 s, and each second of steps has taken 200 s / 60 s since the first attempt
    assert remaining_s(step, train_iters=100, attempts=attempts) == pytest.approx(140 * 200 / 60)
    assert remaining_s(step, train_iters=100, attempts=attempts[:1]) == 140, (
        "never requeued: the trainer's own estimate"
    )
    assert remaining_s(step | {"step": 100}, train_iters=100, attempts=attempts) == 0


def test_an_attempt_that_was_killed_ends_with_its_last_sign_of_life(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    run.started(0, 1000)
    run.started(1, 1500)
    jobs, heard = read_records(run.files), {0: 1300.0, 1: 1560.0}.__getitem__
    assert [(s.start, s.end) for s in attempts_of(jobs, last_sign=heard, running=False)] == [
        (1000, 1300),
        (1500, 1560),
    ]
    assert [s.end for s in attempts_of(jobs, last_sign=heard, running=True, now=1700)] == [1300, 1700]
    assert [s.end for s in attempts_of(jobs, last_sign=lambda _: 2000, running=False)] == [1500, 2000]
    assert allocated_s(attempts_of(jobs, last_sign=lambda _: 0, running=False)) == 0 and goodput({}, []) is None


def test_a_running_run_has_time_left(tmp_path: Path) -> None:
    run, now = MadeRun.at(tmp_path / "run"), time.time()
    run.submitted(time=now - 50)
    run.started(0, now - 40)
    run.steps([(step, 2.0 * step) for step in range(1, 11)])
    run.beat(time=now, state="running", step=10, job_id="7", attempt=0)
    (found,) = overview([run.files.path])
    assert (found.status.state.value, found.eta_s) == ("running", 180.0)
    assert found.goodput == pytest.approx(20 / 40, rel=0.05)


def test_an_element_of_an_array_is_known_by_its_name(tmp_path: Path) -> None:
    run, now = MadeRun.at(tmp_path / "run"), time.time()
    run.submitted("12_3", time=now - 20)
    run.started(0, now - 10, job_id="12_3")
    run.beat(time=now, state="running", step=1, job_id="12_3", attempt=0)
    assert overview([run.files.path])[0].status.state.value == "running"
    run.beat(time=now, state="running", step=1, job_id="12_2", attempt=0)
    assert overview([run.files.path])[0].status.state.value == "lost", "an earlier job's heartbeat"


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    evaluation = json.dumps({"kind": "eval", "step": 1, "eval_loss": 1.0}) + "\n"
    metrics.write_text('{"kind": "train", "step": 1}\n' + evaluation * 200 + '{"kind": "train", "st')
    assert last_step(metrics) == {"kind": "train", "step": 1}
    metrics.write_text('{"kind": "train", "step": 1}\n' + evaluation * (2 * MOST_BYTES // len(evaluation)))
    assert last_step(metrics) == {}, "beyond the bound"


def test_keys_for_programs_are_documented(requeued: MadeRun) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspecting.md").read_text()
    (found,) = overview([requeued.files.path])
    assert [key for key in found.plain() if f"`{key}`" not in page] == []
