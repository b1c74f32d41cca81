"""Finds the run directories that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import read_records

DEFAULT_FOLDER = Path("megatron_output")
"""Where runs are saved unless a recipe says otherwise."""
_DEPTH = 3


_NO_RUNS = {"arrays", "cache", "code", "sweep.json", "chain.json"}
"""Other names that lie beside runs in the folders of sweeps and chains and in `save`."""


def is_run(path: Path) -> bool:
    """Whether it is a run directory, or the folder of a chain's step that does not train."""
    directory = RunDirectory(path)
    return directory.run_json.is_file() or (
        directory.jobs.is_file() and (path.absolute().parent / "chain.json").is_file()
    )


def one_run(path: Path) -> Path:
    """The run directory at a path: the path itself, or the only run beneath it.

    Raises: LaunchError when there is none, with the nearest names, or more than one.
    """
    found = runs_in(path)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(run) for run in found[:4])
        raise LaunchError(f"{path} holds {len(found)} runs; name one: {names}{' …' if len(found) > 4 else ''}")
    if path.exists():
        raise LaunchError(f"{path} is not a run directory: it has no run.json; `megabatch status` lists runs")
    folder = path.parent
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()] if folder.is_dir() else [], n=2)
    hint = f"; nearest in {folder}: {', '.join(near)}" if near else "; `megabatch status` lists runs"
    raise LaunchError(f"{path} does not exist{hint}")


def all_runs(paths: Sequence[Path]) -> list[Path]:
    """Every run at or beneath the paths, or beneath `megatron_output` when none is given.

    With several paths, as from `SWEEP/*`, files and folders beside the runs are skipped.
    Raises: LaunchError for a path that holds none.
    """
    if not paths:
        return runs_in(DEFAULT_FOLDER)
    meant = [path for path in paths if len(paths) == 1 or path.name not in _NO_RUNS]
    return list(dict.fromkeys(run for path in meant or paths for run in (runs_in(path) or [one_run(path)])))


def runs_in(path: Path) -> list[Path]:
    """The path itself when it is a run, else the runs a few levels beneath it, oldest first."""
    if is_run(path):
        return [path]
    found: list[Path] = []
    for depth in range(1, _DEPTH + 1):
        folders = "/".join(["*"] * depth)
        found += [p.parent for p in path.glob(f"{folders}/run.json")]
        found += [p.parent for p in path.glob(f"{folders}/jobs.jsonl") if not (p.parent / "run.json").is_file()]
    return sorted(filter(is_run, found), key=_made)


def _made(run: Path) -> float:
    """When its directory was made; for a step that does not train, the time of its submission."""
    directory = RunDirectory(run)
    if directory.run_json.is_file():
        return directory.run_json.stat().st_mtime
    return min((job.time for job in read_records(directory)), default=0.0)
