"""Why runs failed: evidence against evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.errors import LaunchError
from megabatch.insight.causes import CONSEQUENCES, TABLE, Source
from megabatch.insight.diagnosis import diagnose
from megabatch.insight.evidence import search
from megabatch.slurm.nodelist import node_names
from megabatch.slurm.queue import State

from .made_run import MadeRun

PEER = "RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:4242\n"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """Started once on two nodes of four ranks, and failed; no Slurm knows it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = MadeRun.at(tmp_path / "run")
    run.submitted()
    run.started(0, 1000)
    return run


def test_the_cause_goes_before_who_was_noticed_first(run: MadeRun) -> None:
    run.ended(0, 70, 1100)
    run.failed_first(1, 70, "n1")
    for rank in range(8):
        run.log(rank, "step 3\n" + (OOM if rank == 6 else PEER))
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.cause.name, found.rank, found.node, found.line) == ("oom_gpu", 6, "n2", 2)
    assert found.followers == (0, 1, 2, 3, 4, 5, 7)
    assert found.last_lines[-1].startswith("torch.OutOfMemoryError") and found.log == run.files.rank_log(6, 0)


def test_a_node_that_failed_the_check_before_the_ranks(run: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.ended(0, 1, 1100)
    run.bad_node("n2", "ecc")
    run.bad_node("n9", "ecc", job_id="6")
    said = "megabatch: preflight: not started on n2; leave bad nodes out with `exclude` in the cluster profile\n"
    run.batch(f"megabatch: preflight: n2: xid: NVRM: Xid (PCI:0): 79 (none)\n{said}")
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.cause.name, found.rank, found.node) == ("bad_node", None, "n2")
    assert [bad["node"] for bad in found.plain()["bad_nodes"]] == ["n2"]  # type: ignore[attr-defined]
    assert main(["why", str(run.files.path)]) == 0
    assert "\nbad node: n2: ecc: 3 (0); excluded from the job\n" in capsys.readouterr().out


def test_of_ranks_with_a_cause_the_marked_one_is_blamed(run: MadeRun) -> None:
    run.ended(0, 1, 1100)
    run.failed_first(5, 1, "n2")
    for rank in (2, 5):
        run.log(rank, OOM)
    found = diagnose(run.files.path)
    assert (found.rank, found.node, found.exit_code, found.log) == (5, "n2", 1, run.files.rank_log(5, 0))


def test_what_another_rank_is_said_to_have_failed_of_is_not_ones_own(run: MadeRun) -> None:
    run.ended(0, 1, 1100)
    run.log(0, "error: rank 3 failed: step 9: loss=nan, gradient norm=nan over 4 samples\n")
    run.log(3, "error: step 9: loss=nan, gradient norm=nan over 4 samples\n")
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.cause.name, found.rank, found.followers) == ("nan", 3, (0,))


def test_a_rank_that_ends_because_of_another_one_is_noticed_before_it(run: MadeRun) -> None:
    run.ended(0, 2, 1100)
    run.failed_first(5, 2, "n2")
    run.log(5, "error: rank 0 failed: the layout does not fit\n")
    run.log(0, "error: the layout does not fit\n")
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.rank, found.node, found.exit_code) == (0, "n1", 2)
    assert found.evidence == "error: the layout does not fit" and found.log == run.files.rank_log(0, 0)


def test_a_rank_killed_without_a_word(run: MadeRun) -> None:
    run.ended(0, 137, 1100)
    run.failed_first(5, 137, "n2")
    run.log(5, "step 3\n")
    for rank in (0, 4):
        run.log(rank, PEER)
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.cause.name, found.rank, found.node, found.exit_code) == ("killed", 5, "n2", 137)
    assert "signal 9" in found.evidence and found.last_lines == ("step 3",)
    run.batch(
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
    )
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.cause.name, found.rank) == ("oom_host", 5)


def test_only_consequences_leave_the_marked_rank(run: MadeRun) -> None:
    run.ended(0, 70, 1100)
    run.failed_first(2, 70, "n1")
    for rank in range(4):
        run.log(rank, PEER)
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.cause.name, found.rank) == ("communication", 2)


def test_hung_names_the_suspect(run: MadeRun) -> None:
    run.ended(0, 124, 1100)
    run.failed_first(6, 124, "n2")
    run.batch("megabatch: the run hangs; rank 6 on n2 does not answer\n")
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.cause.name, found.rank, found.node) == ("hung", 6, "n2")


HANGS = "megabatch: the run hangs; rank 6 on n2 does not answer\n"
REQUEUED = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-26T00:25:21 DUE TO JOB REQUEUE ***\n"
CANCELLED = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-26T00:25:21 ***\n"


def test_each_attempt_has_its_own_part_of_the_batch_log(run: MadeRun) -> None:
    """A hang, a killed rank that the job itself requeued, an exception, and an attempt that was requeued."""
    first = "megabatch: rank 3 on n1 failed first, with exit code 137: logs/rank_3.2.log\n"
    said = ("", HANGS + REQUEUED, first + REQUEUED, "", REQUEUED + first)
    run.batch("".join(f"megabatch: attempt {attempt} of job 7 on n[1-2]\n{text}" for attempt, text in enumerate(said)))
    run.ended(0, 1, 1100)
    for attempt, code in ((1, 124), (2, 137), (3, 70), (4, None)):
        run.started(attempt, 1100 + attempt)
        if code is not None:
            run.ended(attempt, code, 1101 + attempt)
    run.failed_first(6, 124, "n2", attempt=1)
    run.failed_first(3, 137, "n1", attempt=2)
    run.log(4, "KeyError: 'text'\n", attempt=3)
    found = [diagnose(run.files.path, attempt=attempt) for attempt in range(5)]
    assert [(one.cause.name, one.rank, one.line) for one in found if one.cause] == [
        ("unknown", None, None),
        ("hung", 6, 3),
        ("killed", 3, None),
        ("exception", 4, 1),
        ("preemption", None, 10),
    ]


def test_a_cancelled_run_stays_cancelled_once_slurm_forgets_it(run: MadeRun) -> None:
    run.line(job_id="7", attempt=0, exit_code=75, time=1100, cancelled=True)
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.state, found.cause.name) == (State.CANCELLED, "cancelled")


@pytest.mark.parametrize(
    ("said", "state", "cause"),
    [
        (CANCELLED, State.CANCELLED, "cancelled"),
        (CANCELLED.replace(" ***\n", " DUE TO TIME LIMIT ***\n"), State.TIMEOUT, "time_limit"),
        (CANCELLED.replace(" ***\n", " DUE TO PREEMPTION ***\n"), State.PREEMPTED, "preemption"),
        (CANCELLED + "megabatch: attempt 0 of job 7 on n1\n", State.LOST, "lost"),
        (REQUEUED, State.LOST, "preemption"),
    ],
)
def test_an_attempt_that_was_killed_before_it_could_end(run: MadeRun, said: str, state: State, cause: str) -> None:
    run.batch(("" if "attempt 0" in said else "megabatch: attempt 0 of job 7 on n1\n") + said)
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.state, found.cause.name) == (state, cause)


def test_a_dead_server_has_its_name_log_and_own_cause(run: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.batch(
        "megabatch: attempt 0 of job 7 on n[1-3]\nmegabatch: role judge, task 1 on n3 ended with exit code 9 while "
        f"the ranks ran; they are asked to save: logs/judge_1.0.log\n    {OOM}"
    )
    log = run.files.logs / "judge_1.0.log"
    log.write_text(f"serving\n{OOM}")
    run.ended(0, 9, 1100)
    for rank in range(8):
        run.log(rank, "step 3\n" + PEER)
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.cause.name, found.role, found.rank, found.node, found.exit_code, found.log) == (
        "role",
        "judge, task 1",
        None,
        "n3",
        9,
        log,
    )
    assert main(["why", str(run.files.path)]) == 0
    out = capsys.readouterr().out
    assert "first: role judge, task 1 on n3, exit code 9\n" in out and f"its log says: {OOM}" in out


VLLM = """\
(APIServer pid=57) WARNING 11-26 15:37:43 [system_utils.py:255] Found ulimit of 20000 and failed to automatically \
increase it. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`
(VllmWorker-0 pid=98) ERROR 11-26 15:38:06 [multiproc_executor.py:953] Traceback (most recent call last):
(VllmWorker-0 pid=98) ERROR 11-26 15:38:06 [multiproc_executor.py:953] ValueError: Available memory on node 0 is low.
(APIServer pid=57) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_a_server_that_never_began_has_the_root_of_its_errors_and_no_warning(run: MadeRun) -> None:
    run.batch(
        "megabatch: attempt 0 of job 7 on n[1-2]\n"
        "megabatch: role rollout, task 0 on n2 ended with exit code 1 before it was ready: logs/rollout_0.0.log\n"
    )
    (run.files.logs / "rollout_0.0.log").write_text(VLLM)
    run.ended(0, 1, 1100)
    found = diagnose(run.files.path)
    assert found.cause is not None and found.cause.name == "role" and found.evidence is not None
    assert found.evidence.endswith("; its log says: ValueError: Available memory on node 0 is low.")


def test_a_step_that_could_never_run_once_slurm_forgets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    steps = [{"name": "train", "after": []}, {"name": "export", "after": [["ok", "train"], ["any", "other"]]}]
    (tmp_path / "chain.json").write_text(json.dumps({"steps": steps}))
    train, export = (MadeRun.at(tmp_path / name) for name in ("train", "export"))
    train.submitted()
    train.started(0, 1000)
    export.submitted("8")
    lost = diagnose(export.files.path)
    assert lost.cause is not None and lost.cause.name == "dependency", "train was lost"
    train.ended(0, 70, 1100)
    found = diagnose(export.files.path)
    assert found.cause is not None and found.cause.name == "dependency"
    assert found.evidence == "Dependency that cannot be met: step train is failed"
    train.started(1, 1200)
    train.ended(1, 0, 1300)
    assert (cause := diagnose(export.files.path).cause) is not None and cause.name == "lost"


def test_an_attempt_that_ended_well_has_no_cause(run: MadeRun) -> None:
    run.ended(0, 75, 1100)
    assert diagnose(run.files.path, attempt=0).cause is None


def test_earlier_attempts_by_number_and_by_themselves(run: MadeRun) -> None:
    run.ended(0, 70, 1100)
    run.log(0, OOM)
    run.started(1, 1200)
    run.log(0, "ModuleNotFoundError: No module named 'x'\n", attempt=1)
    run.ended(1, 1, 1300)
    run.started(2, time.time())
    run.beat(time=time.time(), state="running", step=3, job_id="7", attempt=2)
    found = diagnose(run.files.path)
    assert found.cause is not None and (found.state.value, found.attempt, found.cause.name) == (
        "running",
        1,
        "environment",
    )
    earlier = diagnose(run.files.path, attempt=0)
    assert earlier.cause is not None and earlier.cause.name == "oom_gpu"
    with pytest.raises(LaunchError, match="no attempt 9; there are 0, 1, 2"):
        diagnose(run.files.path, attempt=9)


def test_a_failed_node_is_named(run: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.batch("srun: error: Node failure on n2\n")
    run.log(0, PEER)
    found = diagnose(run.files.path)
    assert found.cause is not None
    assert (found.cause.name, found.rank, found.node) == ("node_failure", None, "n2")
    assert main(["why", str(run.files.path)]) == 0
    assert "\nnode: n2\n" in capsys.readouterr().out


def test_nothing_failed(run: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.ended(0, 0, 1100)
    assert diagnose(run.files.path).cause is None
    assert main(["why", str(run.files.path)]) == 0
    assert "none of its attempts is known to have failed" in capsys.readouterr().out


def test_a_completed_run_names_the_attempts_that_failed_before(
    run: MadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.ended(0, 137, 1100)
    run.started(1, 1200)
    run.ended(1, 0, 1300)
    found = diagnose(run.files.path)
    assert (found.cause, found.outlived, found.plain()["outlived"]) == (None, (0,), [0])
    assert main(["why", str(run.files.path)]) == 0
    assert "completed, job 7; attempt 0 failed before that (`--attempt 0` says why)\n" in capsys.readouterr().out


def test_secrets_in_logs_are_masked(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse")
    run.ended(0, 1, 1100)
    run.log(0, f"using correct horse and WANDB_API_KEY=0123456789\nhf_{'a' * 30}\nValueError: correct horse\n")
    for arguments in ([], ["--json"]):
        assert main(["why", str(run.files.path), *arguments]) == 0
        out = capsys.readouterr().out
        assert "ValueError: " in out and "exception" in out
        assert not any(secret in out for secret in ("correct horse", "0123456789", "hf_aaa"))
    assert json.loads(out)["rank"] == 0


def test_node_lists() -> None:
    assert node_names("n[1-2,08-10],login,gpu[3]-ib") == ["n1", "n2", "n08", "n09", "n10", "login", "gpu3-ib"]
    assert node_names("") == []


def test_a_local_run_whose_rank_dies(tmp_path: Path) -> None:
    """Real ranks over gloo: the killed one is named, whatever its peers write."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.py"
    code = (
        "import os, threading, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    def die():\n"
        "        while not os.path.exists(os.environ['MEGABATCH_RUN'] + '/metrics.jsonl'): time.sleep(0.05)\n"
        "        os.write(2, b'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.\\n')\n"
        "        os._exit(1)\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, str(recipe), "--local", "--train_iters", "5000", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    found = diagnose(tmp_path / "run")
    assert found.cause is not None
    assert (found.cause.name, found.rank, found.exit_code, found.followers) == ("oom_gpu", 1, 1, (0,))
    peer = search((tmp_path / "run" / "logs" / "rank_0.0.log").read_text(), (Source.RANK,))
    assert peer is not None and TABLE[peer[0]].cause in CONSEQUENCES, "what gloo says on the peer does not mislead"
    [said] = [line for line in done.stdout.splitlines() if line.startswith("megabatch: rank")]
    assert said.startswith("megabatch: rank 1 on ") and said.endswith(
        f" failed first, with exit code 1: {tmp_path}/run/logs/rank_1.0.log"
    )
    assert "Traceback" not in (tmp_path / "run" / "logs" / "rank_0.0.log").read_text(), "nor does a trace"
