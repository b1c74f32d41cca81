"""`megabatch checkpoint verify`: every byte of checkpoints at rest against the digests of when they were saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megabatch.cli.runs import is_run
from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.saved.check import faults, undigested
from megabatch.saved.history import (
    TRAINER,
    checkpoints,
    had_manifest,
    id_of,
    misplaced,
    named_by_best,
    named_by_latest,
    of_another_run,
)
from megabatch.saved.manifest import MANIFEST, DamagedError, read_file, read_manifest

_SHOWN = 8


def verify(path: Path, *, workers: int) -> int:
    """Checks all checkpoints of a run, or one folder; 1 when something is damaged, or a pointer names nothing.

    Raises: LaunchError when there is nothing to check; CheckpointError when it cannot be read.
    """
    if not is_run(path):
        if not path.is_dir():
            raise LaunchError(
                f"{path} is not a folder; give a run, one of its step_* folders, or a conversion's output"
            )
        return int(_check(path, workers=workers))
    run = RunDirectory(path)
    found = checkpoints(run)
    if not found:
        raise LaunchError(f"{path} has no checkpoints")
    damaged = [folder.name for folder in reversed(found) if _check(folder, workers=workers)]
    pointers = list(_pointing_to_nothing(run, newest=found[0]))
    for line in pointers:
        print(line)
    if damaged:
        print(f"{len(damaged)} of {len(found)} checkpoints are damaged: {', '.join(damaged)}")
    return int(bool(damaged or pointers))


def _pointing_to_nothing(run: RunDirectory, *, newest: Path) -> Iterator[str]:
    """A line with the fix for each of `latest` and `best` that names no checkpoint; a run may lack both."""
    if os.path.lexists(run.latest) and named_by_latest(run) is None:
        yield (
            f"{run.latest}: names a checkpoint that does not exist; the run resumes from the newest: write "
            f"{newest.name} into it, or the one that you want"
        )
    if os.path.lexists(run.best) and named_by_best(run) is None:
        yield (
            f"{run.best}: names a checkpoint that does not exist; the run's next checkpoint writes it anew: delete "
            "it, or write the one that you want into it"
        )


def _check(folder: Path, *, workers: int) -> bool:
    """Whether a folder is damaged; prints the result."""
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return _say(folder, [str(error)])
    if manifest is None:
        try:
            named = had_manifest(folder)
        except FileNotFoundError:
            if not folder.name.startswith("step_"):
                raise LaunchError(f"{folder} is not a checkpoint: it has neither {TRAINER} nor {MANIFEST}") from None
            return _say(folder, [f"{TRAINER}: is missing, and so is {MANIFEST}"])
        except DamagedError as error:
            return _say(folder, [str(error)])
        if named:
            return _say(folder, [f"{MANIFEST}: is missing"])
        print(f"{folder}: not checked: it was saved before megabatch wrote digests")
        return False
    size = sum(file.size for file in manifest.files.values())
    if found := [*faults(manifest, workers=workers), *_misplaced(folder)]:
        return _say(folder, found)
    note = "; parts have no digest: converted without --verify" if undigested(manifest) else ""
    print(f"{folder}: intact, {len(manifest.files)} files, {size} bytes{note}")
    return False


def _misplaced(folder: Path) -> Iterator[str]:
    """The fault of a checkpoint that lies in another one's folder, or in another run's."""
    try:
        said = json.loads(read_file(folder / TRAINER, TRAINER))
        fault = misplaced(folder, int(said["step"]))
        fault = fault or of_another_run(said.get("run"), id_of(RunDirectory(folder.absolute().parent.parent)))
    except (OSError, ValueError, KeyError, TypeError, DamagedError):
        return  # a conversion, or a file whose damage has its own line
    if fault is not None:
        yield fault


def _say(folder: Path, found: list[str]) -> bool:
    print(f"{folder}: damaged")
    for line in found[:_SHOWN]:
        print(f"  {line}")
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN} more")
    return True
