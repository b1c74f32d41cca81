"""Submits our script through submitit and returns the job; nothing is pickled."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.slurm.array import JobArray, element_id
from megabatch.slurm.bad_nodes import avoided, exclude_option
from megabatch.slurm.environment import for_sbatch
from megabatch.slurm.interrupts import held_back
from megabatch.slurm.ownership import require_own
from megabatch.slurm.records import record_cancellation, record_submission
from megabatch.values import dataclass

_FIXES = (
    ("invalid partition", "`sinfo` lists the partitions; set `partition` in the cluster profile"),
    (
        "invalid account",
        "`sacctmgr show associations user=$USER` lists accounts; set `account` in the cluster profile",
    ),
    ("invalid qos", "`sacctmgr show qos` lists them; set `qos` in the cluster profile"),
    ("invalid feature", "`sinfo -o '%N %f'` lists node features; set `constraint` in the cluster profile"),
    ("time limit", "`sinfo -o '%P %l'` lists the limits; set resources.time below the partition's"),
    ("node count", "`sinfo -o '%P %D'` lists the nodes of each partition; ask for fewer in resources.nodes"),
    (
        "more processors",
        "lower resources.nodes, tasks_per_node or cpus_per_task; `sinfo -o '%P %D %c'` lists what is available",
    ),
    (
        "node configuration",
        "no node has that many CPUs, GPUs (of the profile's `gpu_type`) or that much memory; "
        "`sinfo -o '%N %c %m %G'` lists them",
    ),
    ("memory", "ask for less in resources.mem_gib; `sinfo -o '%N %m'` lists each node's"),
    ("gres", "`sinfo -o '%N %G'` lists the GPUs of each node"),
    (
        "dns srv lookup",
        "Slurm is installed here but has no cluster configured: submit from a login node, set SLURM_CONF, or start a "
        "private one with make cluster",
    ),
    ("unable to process configuration", "Slurm's configuration cannot be read here; check SLURM_CONF"),
    ("unable to contact", "Slurm's controller does not answer; `scontrol ping`, and check SLURM_CONF"),
    ("job violates", "you have reached an accounting limit; `sacctmgr show associations user=$USER` lists them"),
)


_TAKES_S = (0.5, 1.5)
"""What the controller gets to list a job whose sbatch was interrupted: it is asked after each of these."""
_ANSWERS_S = 20
"""How long a command of Slurm may take to answer."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job in the queue."""

    job_id: str
    job: submitit.SlurmJob[Any]
    """submitit's handle."""


class _ScriptExecutor(submitit.SlurmExecutor):
    """Submits a text of ours where submitit would write its own."""

    def __init__(self, folder: Path, *, script: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(folder)
        self._script, self._options = script, options

    def submit_script(self) -> submitit.SlurmJob[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        job = self._submit_command("")
        assert isinstance(job, submitit.SlurmJob)
        return job

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path)]

    def _num_tasks(self) -> int:
        """One handle for the job, whatever its ranks: submitit would make an object for each."""
        return 1


def submit(
    run: RunDirectory, script: str, *, cluster: str | None = None, dependency: str | None = None, hold: bool = False
) -> Submission:
    """Stores `script` as the run's, submits it without nodes that were bad lately, and notes it in `jobs.jsonl`.

    Args: `cluster` is the profile's name, for the record. `dependency` is Slurm's text, of which the stored script
    knows nothing: a resumed run waits for nobody. `hold` keeps the job from starting until it is released.
    Raises: LaunchError when sbatch is missing or refuses, with its own message and the likely fix; when the job cannot
    be noted, or a signal came meanwhile: the job is then cancelled.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    options = (*([f"--dependency={dependency}"] if dependency else []), *(["--hold"] if hold else []))
    with held_back() as signals:
        signals.check(run.path)
        job = _sbatch(run, script, options, avoid=avoided([run]))
        with _cancelled_unless_noted(job.job_id):
            signals.check(run.path)
            record_submission(run, job.job_id, cluster=cluster)
        if signals.number is not None:
            scancel([job.job_id])
            record_cancellation(run, job.job_id)
        signals.check(run.path)
    return Submission(job.job_id, job)


def submit_array(array: JobArray, script: str, *, cluster: str | None = None) -> str:
    """Submits an array by one call of sbatch and notes in each run its element's id (`123_4`); returns the array's.

    Args: `script` as `render_array` gives it; each run's own script must be in place.
    Raises: LaunchError as `submit` does.
    """
    with held_back() as signals:
        signals.check(array.folder)
        array_id = _sbatch(array.files, script, (), avoid=avoided(job.files for job in array.jobs)).job_id
        with _cancelled_unless_noted(array_id):
            signals.check(array.folder)
            for index, job in enumerate(array.jobs):
                record_submission(job.files, element_id(array_id, index), cluster=cluster)
    return array_id


@contextmanager
def _cancelled_unless_noted(job_id: str) -> Iterator[None]:
    """Jobs that their runs know nothing of could be neither watched nor cancelled."""
    try:
        yield
    except BaseException as error:
        done = scancel([job_id])
        if isinstance(error, OSError):
            outcome = f"could not be cancelled; run: scancel {job_id}" if done.returncode else "was cancelled"
            raise LaunchError(f"job {job_id} cannot be noted ({error.strerror or error}) and {outcome}") from error
        raise


def scancel(job_ids: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Cancels jobs; in a session of its own, where a second Ctrl-C does not reach it."""
    return _asked("scancel", *job_ids)


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWERS_S, check=False, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _sbatch(
    files: RunDirectory, script: str, options: tuple[str, ...], *, avoid: Sequence[str]
) -> submitit.SlurmJob[Any]:
    """The stored script does not name the nodes to avoid: they are asked for again each time."""
    _check_programs()
    write_atomic(files.script, script)
    # submitit fills in %j, %t, %A and %a wherever they stand in its folder's name, and ours is to be taken literally
    if re.search(r"%[jtAa]", str(files.path)):
        raise LaunchError(f"{files.path}: a run directory may not contain %j, %t, %A or %a; choose another name")
    options += exclude_option(script, avoid)
    # between its writing and sbatch's reading nobody else may change the script
    folder = files.path / "slurm"
    folder.mkdir(mode=0o755, exist_ok=True)
    require_own(files.path, folder)
    with held_back() as signals:
        try:
            # submitit prints what sbatch says of a refusal, which our own error holds
            with signals.passed_on(), _explained(avoid), _seen_by_sbatch(script), redirect_stderr(io.StringIO()):
                return _ScriptExecutor(folder, script=script, options=options).submit_script()
        except LaunchError as error:
            if signals.number is None:
                raise
            raise signals.error(files.path, _cancel_unheard(folder)) from error
        except OSError as error:  # perhaps after sbatch has answered
            outcome = _cancel_unheard(folder)
            raise LaunchError(f"{files.path} cannot be submitted: {error.strerror or error}; {outcome}") from error


def _cancel_unheard(folder: Path) -> str:
    """Slurm may have taken the job before sbatch was interrupted; it is known by where its script lies. Returns what
    became of it."""
    for seconds in _TAKES_S:
        time.sleep(seconds)
        listed = _asked("squeue", "--me", "--noheader", "--format=%F %o")
        jobs = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
        ours = {job[0] for job in jobs if len(job) == 2 and Path(job[1].strip()).parent == folder}
        if ours and scancel(sorted(ours)).returncode == 0:
            break
        if listed.returncode or ours:
            return "Slurm does not answer, so it may be in the queue: look for it with squeue --me, and scancel it"
    return "it is not in the queue"


def _check_programs() -> None:
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not found: this machine has no Slurm; submit from a login node, or run "
            "here with --local"
        )


@contextmanager
def _explained(avoid: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        without = f"; it was to exclude {', '.join(avoid)}, recently bad according to bad_nodes.jsonl" if avoid else ""
        raise LaunchError(explain(str(error)) + without) from error


def explain(output: str) -> str:
    """sbatch's own words and the likely fix."""
    said = [line.split("sbatch: error: ", 1)[-1].strip() for line in output.splitlines() if "sbatch: error" in line]
    message = " ".join(dict.fromkeys(said)) or output.strip()
    fixes = [fix for sign, fix in _FIXES if sign in message.lower()]
    return f"sbatch refused the job, nothing was queued: {message}" + (f"; {fixes[0]}" if fixes else "")


@contextmanager
def _seen_by_sbatch(script: str) -> Iterator[None]:
    """submitit gives sbatch this process's own environment."""
    before, after = dict(os.environ), for_sbatch(os.environ, script)
    for name in before.keys() - after.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
