"""`megabatch why`: the rank that failed first, the class of the failure, what to do, and the log that says so."""

from __future__ import annotations

import json
from pathlib import Path

from megabatch.cli.runs import all_runs, one_run
from megabatch.insight.diagnosis import Diagnosis, diagnose
from megabatch.insight.masking import Masker
from megabatch.slurm.queue import State
from megabatch.slurm.state import status

_WELL = (State.COMPLETED, State.NOT_SUBMITTED)
LONGEST = 300
"""Longest shown line of a log, in characters."""


def show_why(path: Path, *, attempt: int | None, as_json: bool) -> int:
    """Prints the diagnosis of a run, or of each failed run of a sweep or chain; masks secrets in log lines.

    Raises: LaunchError when there is no such run or attempt.
    """
    runs, mask = all_runs([path]), Masker()
    if len(runs) == 1 or attempt is not None:
        found = diagnose(one_run(path), attempt=attempt)
        print(json.dumps(mask(found.plain()), indent=2) if as_json else mask.text(text(found)))
        return 0
    failed = [diagnose(now.run) for now in status(runs) if not now.state.active and now.state not in _WELL]
    if as_json:
        print(json.dumps([mask(one.plain()) for one in failed], indent=2))
    else:
        print(mask.text("\n\n".join(map(text, failed))) if failed else f"none of the {len(runs)} runs has failed")
    return 0


def text(found: Diagnosis) -> str:
    head = f"{found.run} is {found.state}"
    if found.job_id is not None:
        head += f", job {found.job_id}"
    cause = found.cause
    if cause is None and found.outlived:
        failed = ", ".join(map(str, found.outlived))
        head += f"; attempt {failed} failed before that (`--attempt {found.outlived[-1]}` says why)"
        return "\n".join([head, *_beside(found)])
    if cause is None:
        return "\n".join([f"{head}; none of its attempts is known to have failed", *_beside(found)])
    if found.attempt is not None:
        head += f"; its attempt {found.attempt} failed"
    lines = [head, f"cause: {cause.title} [{cause.name}]"]
    if found.role is not None or found.rank is not None:
        who = f"rank {found.rank}" if found.role is None else f"role {found.role}"
        place = f" on {found.node}" if found.node else ""
        code = "" if found.exit_code is None else f", exit code {found.exit_code}"
        lines.append(f"first: {who}{place}{code}")
    else:
        lines += [f"node: {found.node}"] if found.node else []
        lines += [] if found.exit_code is None else [f"exit code: {found.exit_code}"]
    if found.evidence:
        place = "" if found.log is None or found.line is None else f"   ({found.log.name}:{found.line})"
        lines.append(f"said: {found.evidence[:LONGEST]}{place}")
    lines.append(f"fix: {cause.fix}")
    lines += _beside(found)
    if found.followers:
        lines.append(f"ended as a consequence, with no cause in their logs: {_ranks(found.followers)}")
    if found.last_lines:
        lines += ["", f"last lines of {found.log}:", *(f"    {line[:LONGEST]}" for line in found.last_lines)]
    return "\n".join(lines)


def _beside(found: Diagnosis) -> list[str]:
    """Further facts besides the cause, one line each."""
    return [*_bad_nodes(found), *(f"checkpoint: {note.describe()}" for note in found.damaged)]


def _bad_nodes(found: Diagnosis) -> list[str]:
    """The preflight's findings, one line per fault."""
    return [
        f"bad node: {bad.node}: {bad.check}: {bad.value[:LONGEST]} ({bad.rule})"
        + ("; excluded from the job" if bad.excluded else "")
        for bad in found.bad_nodes
    ]


def _ranks(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{' …' if len(ranks) > 8 else ''}"
