"""`megabatch report`: a page about runs, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.runs import all_runs
from megabatch.errors import LaunchError
from megabatch.insight.report import report
from megabatch.run_directory import write_atomic


def write_report(paths: Sequence[Path], *, output: Path) -> int:
    """Writes the page. Raises: LaunchError for a path without a run, or an output that cannot be written."""
    runs = all_runs(paths)
    if not runs:
        raise LaunchError("no runs found; `megabatch status` lists runs")
    text = report(runs)
    try:
        write_atomic(output, text)
    except OSError as error:
        raise LaunchError(f"{output} cannot be written: {error.strerror or error}; choose another --output") from error
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text.encode()) / 1024:.0f} KiB")
    return 0
