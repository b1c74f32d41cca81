"""`megabatch sweep show`: a sweep's runs, ranked."""

from __future__ import annotations

from pathlib import Path

from megabatch.sweep import results


def show_sweep(path: Path, *, by: results.Rank, as_json: bool) -> int:
    """Prints the table, or JSON for programs. Raises: LaunchError for a folder that is not a sweep's."""
    found = results.results_in(results.sweeps_folder(path))
    print(results.as_json(found, by=by) if as_json else results.results_table(found, by=by))
    return 0
