"""What a sweep's folder holds: one run directory for each point, its arrays, and `sweep.json`.

We write hundreds of runs together: under temporary names, synced once, then renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megabatch.config.run import RunConfig
from megabatch.entry.launch import Launch, differences, new_id
from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.slurm.ownership import require_own
from megabatch.sweep.candidates import Candidates
from megabatch.values import dataclass

SWEEP_JSON = "sweep.json"
SCHEMA_VERSION = 1


def other_runs(found: Candidates) -> list[str]:
    """Folders of points that hold a run of another configuration, and what differs."""
    refused = []
    for candidate in found.kept:
        path = candidate.launch.directory.run_json
        if path.exists():
            existing = RunConfig.load(path)
            changed = differences(existing, candidate.launch.config(provenance=existing.provenance, existing=existing))
            refused += [f"{path.parent} holds another run: it differs in {', '.join(changed)}"] if changed else []
    return refused


@dataclass(frozen=True, slots=True)
class Written:
    """Files and folders that one submission made, to remove if it fails."""

    runs: tuple[RunDirectory, ...]
    folders: tuple[Path, ...]
    """Folders that hold them, innermost first."""

    def take_away(self, also: Sequence[Path] = ()) -> None:
        """Removes runs without a job, and folders that are then empty.

        Args: `also` are folders to remove too if their parent folder was made with the runs.
        """
        if also:
            for folder in self.folders:
                (folder / SWEEP_JSON).unlink(missing_ok=True)
        for directory in self.runs:
            if not directory.jobs.exists():
                shutil.rmtree(directory.path, ignore_errors=True)
        for folder in also:
            if folder.parent in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_runs(launches: Sequence[Launch], scripts: Sequence[str], provenance: Mapping[str, Any]) -> Written:
    """Makes the missing run directories, completely or not at all, and writes the script of the others.

    Args: `launches` are without faults; an empty script means none, for a run on this machine.
    Raises: LaunchError when they cannot be written, or an existing one belongs to another user.
    """
    folder = launches[0].directory.path.parent
    missing = tuple(path for path in (folder, *folder.parents) if not path.exists())
    staged = folder / f".staged.{os.getpid()}"
    made: list[RunDirectory] = []
    new = [not launch.directory.run_json.exists() for launch in launches]
    try:
        staged.mkdir(mode=0o755, parents=True)
        for launch, script, is_new in zip(launches, scripts, new, strict=True):
            if not is_new:
                require_own(launch.directory.path, launch.directory.run_json)
                if script:
                    write_atomic(launch.directory.script, script)
                continue
            place = RunDirectory(staged / launch.directory.path.name)
            place.path.mkdir(mode=0o755)
            _write_own(place.run_json, launch.run_json(provenance={**provenance, "id": new_id()}))
            if script:
                _write_own(place.script, script)
        if any(new):
            _sync(staged)
        for launch, is_new in zip(launches, new, strict=True):
            if is_new:
                os.rename(staged / launch.directory.path.name, launch.directory.path)
                made.append(launch.directory)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        Written(tuple(made), missing).take_away()
        raise LaunchError(
            f"{folder} cannot be written: {error.strerror or error}; free space, or choose another with --run_dir"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Written(tuple(made), missing)


def _write_own(path: Path, text: str) -> None:
    """A new file that nobody else can write, whatever the umask."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(text.encode(errors="surrogateescape"))


def _sync(folder: Path) -> None:
    """Flushes the folder's whole file system to disk: one call for any number of files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def array_folders(folder: Path) -> Iterator[Path]:
    """`arrays/<number>` with unused numbers: a waiting array still uses its own folder."""
    taken = [int(path.name) for path in (folder / "arrays").glob("*") if path.name.isdecimal()]
    for number in itertools.count(max(taken, default=-1) + 1):
        yield folder / "arrays" / str(number)


def describe(found: Candidates) -> None:
    """Writes `sweep.json`: every point with its values and why it was left out; earlier points stay."""
    path = found.folder / SWEEP_JSON
    found.folder.mkdir(parents=True, exist_ok=True)
    points = read_sweep(found.folder).get("points", {}) if path.exists() else {}
    for candidate in found.all:
        points[candidate.point.name] = {
            "values": dict(candidate.point.values),
            "pruned": candidate.pruned or None,
        }
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": found.name,
        "recipe_file": str(found.base.recipe_file),
        "points": points,
    }
    write_atomic(path, json.dumps(document, indent=1) + "\n")


def read_sweep(folder: Path) -> dict[str, Any]:
    """`sweep.json`. Raises: LaunchError when it is missing or cannot be read."""
    path = folder / SWEEP_JSON
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{folder} is not a sweep's folder: {SWEEP_JSON} cannot be read ({error})") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise LaunchError(f"{path}: schema_version={version!r}, but this megabatch reads {SCHEMA_VERSION}")
    return dict(document)
