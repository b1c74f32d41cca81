"""Running a chain on this machine: the same graph, one step after the other."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace

from megabatch.chain.declare import Convert
from megabatch.chain.graph import Fate, may_start
from megabatch.chain.ready import ReadyChain
from megabatch.chain.record import to_run, write_record
from megabatch.chain.step import ReadyStep
from megabatch.chain.submission import written_step
from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local
from megabatch.slurm.records import LOCAL, Start, next_attempt, record_start
from megabatch.slurm.script.inputs import inputs
from megabatch.slurm.script.stopping import LAST_WORD


def run_chain(ready: ReadyChain, arguments: Sequence[str]) -> int:
    """Runs missing and failed steps in order, each if its conditions are met.

    Returns 0 when every step that could start succeeded, `REQUEUE` when a step was asked to stop, else the exit code
    of the first step that failed. Raises: ConfigError, LaunchError.
    """
    again = {one.step.name for one in to_run(ready)}
    write_record(ready)
    fates: dict[str, Fate] = {}
    first_failure = int(ExitCode.DONE)
    for one in ready.steps:
        name = one.step.name
        if not may_start(one.step, fates):
            fates[name] = "never"
            print(f"=== {name}: never starts, because of how the steps before it ended", flush=True)
        elif name not in again:
            fates[name] = "done"
            print(f"=== {name}: done already", flush=True)
        else:
            print(f"=== {name}: {one.job.run_directory}", flush=True)
            code = _run(one, ready, arguments)
            if code == ExitCode.REQUEUE:
                return code
            fates[name] = "failed" if code else "done"
            first_failure = first_failure or code
            if code:
                print(f"=== {name}: failed with exit code {code}; logs are in {one.job.files.logs}", flush=True)
    return first_failure


def _run(one: ReadyStep, ready: ReadyChain, arguments: Sequence[str]) -> int:
    with written_step(one, arguments):
        if missing := fix_inputs(one.job):
            print(missing, end="", flush=True)
            return ExitCode.CONFIG
        return run_local(local_job(one), ready.profile)


def local_job(one: ReadyStep) -> JobSpec:
    """The step's job on this machine: a conversion shares its work among threads, not tasks."""
    return replace(one.job, nodes=1, tasks_per_node=1) if isinstance(one.work, Convert) else one.job


def fix_inputs(job: JobSpec) -> str:
    """Fixes the inputs as the start of the batch script does; returns the missing ones."""
    if not job.inputs:
        return ""
    attempt = next_attempt(job.files)
    own = {"MEGABATCH_RUN": str(job.run_directory), "MEGABATCH_JOB_ID": LOCAL, "MEGABATCH_ATTEMPT": str(attempt)}
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -eo pipefail", *LAST_WORD, *inputs(job)])],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (ExitCode.DONE, ExitCode.CONFIG):
        raise LaunchError(f"{job.run_directory}: inputs cannot be linked: {done.stderr.strip()}")
    if done.returncode:
        record_start(job.files, Start(attempt, time.time(), socket.gethostname()))
        job.files.logs.mkdir(parents=True, exist_ok=True)
        with open(job.files.batch_log(LOCAL), "a", encoding="utf-8") as log:
            log.write(f"megabatch: attempt {attempt} of job {LOCAL} on {socket.gethostname()}\n{done.stderr}")
    return done.stderr if done.returncode else ""
