"""Running a sweep on this machine, a few runs at a time."""

from __future__ import annotations

from collections.abc import Sequence

from megabatch.entry.launch_checks import require_torch
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local_array import run_local_array
from megabatch.sweep.candidates import Candidate, Candidates
from megabatch.sweep.folder import write_runs
from megabatch.sweep.results import metric_of, results_in
from megabatch.sweep.results_text import results_text
from megabatch.sweep.submission import sweep_provenance


def run_here(found: Candidates, wanted: Sequence[Candidate], arguments: Sequence[str]) -> int:
    """Runs missing and failed points, prints how each ends, and then ranks all; exit code 0 when all are done.

    Raises: LaunchError when nothing can be trained here or a folder cannot be written.
    """
    require_torch()
    launches = [candidate.launch for candidate in wanted]
    codes: list[int] = []
    if launches:
        write_runs(launches, [""] * len(launches), sweep_provenance(found, arguments))
        jobs = [launch.job for launch in launches]
        codes = run_local_array(jobs, found.base.profile, max_parallel=found.max_parallel or 1, report=_say)
    print(results_text(results_in(found.folder), by=metric_of(found.folder)))
    for candidate, code in zip(wanted, codes, strict=True):
        if code not in (ExitCode.DONE, ExitCode.REQUEUE):
            logs = candidate.launch.directory.logs
            print(f"error: {candidate.point.name} failed with exit code {code}; its logs are in {logs}")
    if ExitCode.REQUEUE in codes:
        print("stopped and saved; the same command continues with what is missing")
    return worst(codes)


def worst(codes: Sequence[int]) -> ExitCode:
    """The worst exit code: failure before stopped, stopped before success."""
    if any(code not in (ExitCode.DONE, ExitCode.REQUEUE) for code in codes):
        return ExitCode.FAILED
    return ExitCode.REQUEUE if ExitCode.REQUEUE in codes else ExitCode.DONE


def _say(job: JobSpec, text: str) -> None:
    print(f"{job.run_directory.name}: {text}", flush=True)
