"""`megabatch sweep show`: a sweep's runs, ranked."""

from __future__ import annotations

from pathlib import Path

from megabatch.sweep.results import metric_of, results_in, sweeps_folder
from megabatch.sweep.results_text import as_json, results_text


def show_sweep(path: Path, *, by: str | None, json: bool) -> int:
    """Prints the tables, or JSON for programs; `by` None takes the runs' own measure.

    Raises: LaunchError for a folder that is not a sweep's, and a metric that no run has.
    """
    folder = sweeps_folder(path)
    found, by = results_in(folder), by or metric_of(folder)
    print(as_json(found, by=by) if json else results_text(found, by=by))
    return 0
