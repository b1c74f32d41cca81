"""The quickstart recipe on the private Slurm, started, watched and disturbed as people and clusters do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.processes import tagged_processes
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.state import RunStatus, status

from .gate import Gate

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 60
SAVED_EVERY = 10
SIZE = {
    "nodes": 2,
    "tasks_per_node": 1,
    "train_iters": STEPS,
    "save_interval": SAVED_EVERY,
    "eval_interval": 20,
    "val_dataset": "example:arithmetic#24",
    "split_dataset_ratio": 0,
}
"""Flags of every run here: two nodes with one rank each, which share the experts and the optimizer's state."""


@dataclass(frozen=True)
class Training:
    """One run directory, and the commands that a person would give for it."""

    files: RunDirectory
    folder: Path
    """Where its commands are given."""
    environment: Mapping[str, str]
    gate: Gate

    def submit(self, **flags: object) -> subprocess.CompletedProcess[str]:
        """`python recipes/quickstart.py --submit`, which must succeed."""
        words = [word for name, value in (SIZE | flags).items() for word in (f"--{name}", str(value))]
        folder = str(self.files.path)
        return self._run(str(RECIPES / "quickstart.py"), "--submit", "--run_dir", folder, *words)

    def megabatch(self, command: str, *words: str) -> str:
        """Output of `megabatch COMMAND RUN_DIRECTORY`, which must succeed."""
        return self._run("-m", "megabatch.cli", command, str(self.files.path), *words).stdout

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-P", *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    def now(self) -> RunStatus:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", self.environment["SLURM_CONF"])
            return status([self.files.path], fresh_s=0)[0]

    def wait(self, *states: State, timeout_s: float = 400) -> RunStatus:
        """Until the run is in one of `states`; where it is over, until its batch script has had its last word.

        The heartbeat says `done`, and Slurm that a job failed, before that.
        """

        def reached() -> RunStatus | None:
            now = self.now()
            assert now.state in states or now.state.active, f"{now}\n{self.logs()}"
            return now if now.state in states else None

        found = until(reached, timeout_s=timeout_s, what=f"{states}, now {self.now()}\n{self.logs()}")
        assert isinstance(found, RunStatus)
        if found.state in (State.COMPLETED, State.FAILED, State.STOPPED):
            until(lambda: has_ended(self.files), timeout_s=timeout_s, what=f"its ending\n{self.logs()}")
        return found

    def wait_step(self, step: int, *, timeout_s: float = 400) -> None:
        """Until that step is in metrics.jsonl."""
        until(lambda: self.steps()[-1:] >= [step], timeout_s=timeout_s, what=f"step {step}\n{self.logs()}")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """metrics.jsonl, without a last line that is still being written."""
        text = self.files.metrics.read_text() if self.files.metrics.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["kind"] == kind]

    def steps(self) -> list[int]:
        """Training steps in the order in which they were done; a step may come again after a resume."""
        return [line["step"] for line in self.lines("train")]

    def curves(self) -> dict[str, dict[int, tuple[float, ...]]]:
        """All that training computed of each step and of each evaluation; the last line of a step counts."""
        exact = ("loss_sum", "loss_count", "loss", "grad_norm", "learning_rate", "consumed_tokens", "epoch")
        return {
            "train": {line["step"]: tuple(line[name] for name in exact) for line in self.lines("train")},
            "eval": {line["step"]: (line["eval_loss_sum"], line["eval_loss_count"]) for line in self.lines("eval")},
        }

    def exported(self, step: int = STEPS) -> dict[str, str]:
        """Checksums of a checkpoint's Hugging Face folder."""
        folder = self.files.step(step) / "hf"
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    def checkpoints(self) -> list[int]:
        """Steps with a folder of a final name."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.files.checkpoints.glob("step_*"))

    def ranks(self) -> list[int]:
        """Process ids of the trainer, rank 0 first."""
        found = {}
        for pid in tagged_processes(f"MEGABATCH_RUN={self.files.path}", also="RANK="):
            if b"megabatch.trainer.main" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found[next(v for v in variables if v.startswith(b"RANK="))] = pid
        return [found[rank] for rank in sorted(found)]

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.files.logs.glob("*")))


def has_ended(run: RunDirectory) -> bool:
    """Whether the newest attempt's batch script has written what it came to, which is after the trainer's last act."""
    jobs = read_records(run)
    return bool(jobs and jobs[-1].starts and jobs[-1].ending_of(jobs[-1].starts[-1]))


def until(condition: Callable[[], Any], *, timeout_s: float, what: str, poll_s: float = 0.05) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(poll_s)
    return value


NewTraining = Callable[..., Training]


@pytest.fixture(scope="session")
def environment(slurm_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every command talks to the private Slurm, and all runs share one token cache."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | slurm_cluster.environment | {"MEGABATCH_CACHE": cache}


@pytest.fixture(scope="session")
def new_training(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> NewTraining:
    def new(
        name: str,
        *,
        on: str | None = "n[1-2]",
        sbatch: Mapping[str, object] | None = None,
        held_after: int | None = None,
        setup: Sequence[str] = (),
        fault: str | None = None,
        **flags: object,
    ) -> Training:
        """Submits a run to those nodes, or any, with more of the profile; its first attempt may be held.

        Args: fault: Python that every process of its jobs runs first, to bring about what must happen to it.
        """
        folder = tmp_path_factory.mktemp(name)
        profile = folder / "cluster.toml"
        options = {**({"nodelist": on} if on else {}), **(sbatch or {})}
        lines = [f"setup = {json.dumps(setup)}", "[sbatch]", *(f"{k} = {json.dumps(v)}" for k, v in options.items())]
        if fault is not None:
            (folder / "fault").mkdir()
            (folder / "fault" / "sitecustomize.py").write_text(fault)
            lines += ["[environment]", f"PYTHONPATH = {json.dumps(str(folder / 'fault'))}"]
        profile.write_text("\n".join(lines))
        decoy = folder / "megabatch"
        decoy.mkdir()
        (decoy / "__init__.py").write_text(
            "raise SystemExit('jobs must run the snapshot, not the folder they are in')"
        )
        gate = Gate(folder)
        if held_after is not None:
            gate.close(after=held_after)
        training = Training(RunDirectory(folder / "run"), folder, environment | gate.environment(), gate)
        training.submit(cluster=profile, **flags)
        return training

    return new


@pytest.fixture(scope="session")
def uninterrupted(new_training: NewTraining) -> Training:
    """The run that nobody disturbs, to which the others must come out equal."""
    training = new_training("uninterrupted")
    training.wait(State.COMPLETED)
    assert training.steps() == list(range(1, STEPS + 1))
    return training
