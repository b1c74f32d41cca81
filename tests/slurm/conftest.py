"""What tests on the private Slurm share: submitting a small payload and waiting for what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.job import JobSpec
from megabatch.slurm.logs import rank_logs
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.render import render
from megabatch.slurm.state import RunStatus, status
from megabatch.slurm.submit import submit

PAYLOAD = Path(__file__).with_name("payload.py")
ENDED = {state for state in State if not state.active}


def until(condition: Callable[[], Any], *, timeout_s: float = 300, what: str = "it") -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)
    return value


@dataclass(frozen=True)
class Submitted:
    """A payload in the queue."""

    run: RunDirectory
    job_id: str

    def now(self) -> RunStatus:
        return status([self.run.path], fresh_s=0)[0]

    def wait(self, *states: State, timeout_s: float = 300) -> RunStatus:
        """Until it is in one of `states`, by default until it ended."""

        wanted = set(states) or ENDED
        deadline = time.monotonic() + timeout_s
        while (now := self.now()).state not in wanted:
            waiting = now.state not in ENDED and time.monotonic() < deadline
            assert waiting, f"not one of {wanted} after at most {timeout_s} s: {now}\n{self.batch_log()}"
            time.sleep(0.1)
        return now

    def wait_listening(self, *, attempt: int = 0, ranks: int = 1, timeout_s: float = 300) -> None:
        """Until `ranks` ranks of that attempt have said what they see."""
        until(
            lambda: (
                sum(bool(self.said(log.rank, attempt)) for log in rank_logs(self.run.path) if log.attempt == attempt)
                >= ranks
            ),
            timeout_s=timeout_s,
            what=f"{ranks} ranks of attempt {attempt}",
        )

    def said(self, rank: int, attempt: int = 0) -> list[dict[str, Any]]:
        path = self.run.rank_log(rank, attempt)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half written
        return [json.loads(line) for line in lines if line.startswith("{")]

    def batch_log(self) -> str:
        path = self.run.logs / f"batch.{self.job_id}.log"
        return path.read_text() if path.exists() else ""


Submit = Callable[..., Submitted]


def payload_spec(folder: Path) -> JobSpec:
    """One rank on one node that ends at once."""
    return JobSpec(name="payload", run_directory=folder / "run", python=sys.executable, cpus_per_task=1, time="10")


def submit_job(job: JobSpec, *, profile: ClusterProfile | None = None, options: dict[str, object]) -> Submitted:
    """Submits the payload as `job` to the Slurm that the environment names."""
    words = tuple(f"{name}={value}" for name, value in options.items())
    job = replace(job, arguments=(str(PAYLOAD), *words))
    return Submitted(job.files, submit(job.files, render(job, profile or ClusterProfile())).job_id)


@pytest.fixture
def payload_job(tmp_path: Path) -> JobSpec:
    return payload_spec(tmp_path)


@pytest.fixture
def submit_payload(slurm: PrivateCluster, payload_job: JobSpec) -> Submit:
    """Submits the payload; keywords beside `profile` and `options` change its JobSpec."""

    def submit_(
        *, profile: ClusterProfile | None = None, options: dict[str, object] | None = None, **spec: Any
    ) -> Submitted:
        return submit_job(replace(payload_job, **spec), profile=profile, options=options or {})

    return submit_


@pytest.fixture
def scontrol(slurm: PrivateCluster) -> Callable[..., str]:
    def scontrol_(*arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    return scontrol_


@pytest.fixture
def controller_sends_srun_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets one srun of so many through; the others end as where a controller is restarted before it answers.

    It has made their steps, which hold the job's processors until it ends.
    """

    def let_through_one_of(so_many: int) -> None:
        wrapper = tmp_path / "bin" / "srun"
        wrapper.parent.mkdir()
        wrapper.write_text(f"""#!/bin/bash
echo >>"{tmp_path}/tries"
if [ "$(($(wc -l <"{tmp_path}/tries") % {so_many}))" -ne 0 ]; then
    {shutil.which("srun")} --overlap bash -c 'touch "{tmp_path}/made.$0"; exec sleep 600' "$$" &
    until [ -e "{tmp_path}/made.$$" ]; do sleep 0.1; done
    echo "srun: error: Unable to create step for job $SLURM_JOB_ID: Connection reset by peer" >&2
    exit 1
fi
exec {shutil.which("srun")} "$@"
""")
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")

    return let_through_one_of
