"""`megabatch status`: one line for each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.runs import all_runs
from megabatch.cli.table import table
from megabatch.slurm.state import RunStatus, status


def show_status(paths: Sequence[Path], *, as_json: bool) -> int:
    """Prints the state of the runs at or beneath the paths. Raises: LaunchError for a path that holds no run."""
    found = status(all_runs(paths))
    if as_json:
        print(json.dumps([_plain(one) for one in found], indent=2))
    elif found:
        print(table(("RUN", "STATE", "STEP", "JOB", "HEARD", "WHY"), [_row(one) for one in found]))
    else:
        print("no runs beneath megatron_output; name their folder: megabatch status DIR")
    return 0


def _row(one: RunStatus) -> tuple[str, ...]:
    job = one.job_id or "-"
    if one.restart:
        job += f" (restart {one.restart})"
    why = one.reason or (f"exit code {one.exit_code}" if one.exit_code else "")
    step = "-" if one.step is None else str(one.step)
    return str(one.run), one.state.value, step, job, _age(one.heartbeat_age_s), why


def _plain(one: RunStatus) -> dict[str, object]:
    return {name: str(value) if isinstance(value := getattr(one, name), Path) else value for name in one.__slots__}


def _age(seconds: float | None) -> str:
    """`12 s ago`, `3 min ago`, `5 h ago`, `2 d ago`."""
    if seconds is None or seconds == float("inf"):
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
