"""Which checkpoint a run resumes from, and what happens to the others.

`checkpoints/latest` decides: a run resumes from the checkpoint that it names, and a user may edit it. If it names no
existing checkpoint, the newest counts. We rename unusable checkpoints and never delete them: `damaged.step_<n>` for
one that is not what was saved, `later.step_<n>` for one from a history that the run has abandoned. No reader takes
such a name for a checkpoint. Each renaming adds a line to `checkpoints/set_aside.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megabatch.errors import CheckpointError
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.saved.manifest import MANIFEST, read_file, read_manifest
from megabatch.values import dataclass

TRAINER, MCORE, HF = "trainer.json", "mcore", "hf"
"""Parts of a checkpoint: progress, the state for a resume, and the Hugging Face folder."""
_NAME = re.compile(r"step_\d{8,}")


@dataclass(frozen=True, slots=True)
class SetAside:
    """A checkpoint that was renamed."""

    kind: Literal["damaged", "later"]
    step: int
    name: str
    """Of its folder now."""
    why: str
    """The fault, starting with the file; or the checkpoint that the run went back to."""
    went_on: str
    """The checkpoint that the run resumed from instead."""
    time: float
    """Seconds since the epoch."""

    def describe(self) -> str:
        """For people: one line."""
        if self.kind == "damaged":
            return (
                f"step_{self.step:08d} is damaged ({self.why}), set aside as {self.name}; resumed from {self.went_on}"
            )
        return f"step_{self.step:08d} is set aside as {self.name}: {self.why}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is named like a checkpoint."""
    return bool(_NAME.fullmatch(path.name)) and path.is_dir()


def checkpoints(run: RunDirectory) -> list[Path]:
    """Every folder named like a checkpoint, newest first."""
    return _checkpoints_in(run.checkpoints)


def newest_in(folder: Path) -> Path | None:
    """The current checkpoint in a `checkpoints/` folder: what `latest` names, or the newest if that is missing."""
    return _named_by(folder / "latest") or next(iter(_checkpoints_in(folder)), None)


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(filter(is_checkpoint, folder.glob("step_*")), key=step_of, reverse=True)


def named_by_latest(run: RunDirectory) -> Path | None:
    """The checkpoint that `latest` names, or None if it is missing."""
    return _named_by(run.latest)


def named_by_best(run: RunDirectory) -> Path | None:
    """The checkpoint that `best` names, or None if it is missing."""
    return _named_by(run.best)


def point_to_best(run: RunDirectory, step: int | None) -> None:
    """Points `best` to the checkpoint of a step, or to nothing if that is missing."""
    target = None if step is None else run.step(step)
    if target is not None and is_checkpoint(target):
        if named_by_best(run) != target:
            write_atomic(run.best, target.name + "\n")
    else:
        run.best.unlink(missing_ok=True)


def _named_by(latest: Path) -> Path | None:
    try:
        if not latest.is_file():  # opening a pipe would block
            return None
        path = latest.with_name(latest.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):  # also for a text that is not a valid name
        return None
    return path if is_checkpoint(path) else None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The checkpoints that a run may resume from."""

    usable: tuple[Path, ...]
    """In the order in which we try them."""
    later: tuple[Path, ...]
    """Newer than the one that `latest` names."""


def candidates(run: RunDirectory) -> Candidates:
    """The checkpoints that an attempt of this run may resume from."""
    found, latest = checkpoints(run), named_by_latest(run)
    later = tuple(path for path in found if latest is not None and step_of(path) > step_of(latest))
    return Candidates(tuple(path for path in found if path not in later and _may_be_resumed(path)), later)


def _may_be_resumed(path: Path) -> bool:
    """Whether it was saved with the state for a resume; we do not look for damage here."""
    try:
        manifest = read_manifest(path)
        if manifest is not None:
            return bool(manifest.below(MCORE))
        return (path / MCORE).is_dir() or had_manifest(path)
    except (CheckpointError, OSError):
        return True


def had_manifest(path: Path) -> bool:
    """Whether the checkpoint was saved with a manifest, by its `trainer.json`.

    Raises: FileNotFoundError; CheckpointError when it cannot be read.
    """
    return MANIFEST.encode() in read_file(path / TRAINER, TRAINER)


def misplaced(path: Path, step: int) -> str | None:
    """The fault of a folder named like a checkpoint that another one was copied or renamed to. Args: step: that its
    `trainer.json` gives."""
    if not is_checkpoint(path.absolute()) or step_of(path.absolute()) == step:
        return None
    return f"{TRAINER}: is of step {step}: the folder is a copy of another checkpoint, or was renamed"


def id_of(run: RunDirectory) -> str | None:
    """What tells a run from every other, also once its folder is moved or copied; None for an older run."""
    try:
        return str(json.loads(run.run_json.read_text(encoding="utf-8"))["provenance"]["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_another_run(saved: str | None, own: str | None) -> str | None:
    """The fault of a checkpoint in a run's folder that another run saved. Args: the two runs' `id_of`."""
    if saved is None or own is None or saved == own:
        return None
    return f"{TRAINER}: is of another run; to begin with what it holds, name it in checkpoint.load"


def settle(
    run: RunDirectory,
    chosen: Path,
    damaged: Sequence[tuple[Path, str]],
    later: Sequence[Path],
    *,
    point: bool = True,
) -> list[SetAside]:
    """Makes `chosen` the newest: renames damaged and later checkpoints and replaces `latest`.

    Args: point: False leaves `latest`, since a newer one than `chosen` may be readable again.
    """
    why = f"the run went back to {chosen.name}"
    renamed = [set_aside(run, path, "damaged", why=fault, went_on=chosen.name) for path, fault in damaged]
    renamed += [set_aside(run, path, "later", why=why, went_on=chosen.name) for path in later]
    if point and named_by_latest(run) != chosen:
        write_atomic(run.latest, chosen.name + "\n")
    return renamed


def set_aside(run: RunDirectory, path: Path, kind: Literal["damaged", "later"], *, why: str, went_on: str) -> SetAside:
    """Renames a checkpoint so that no reader takes it for one."""
    target = path.with_name(f"{kind}.{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{kind}.{path.name}.{number}")
    note = SetAside(kind, step_of(path), target.name, why, went_on, time.time())
    # first: a note without its folder does no harm after a kill, and a folder without its note is never shown
    with open(run.set_aside, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(note)) + "\n")
    os.rename(path, target)
    return note


def notes(run: RunDirectory) -> list[SetAside]:
    """The checkpoints that were set aside and still exist, oldest first."""
    try:
        text = run.set_aside.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[str, SetAside] = {}  # of a folder with two notes, the first was written before a kill
    for line in text.splitlines():
        try:
            note = SetAside(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if (run.checkpoints / note.name).is_dir():
            found[note.name] = note
    return list(found.values())


def find(run: RunDirectory, name: str) -> Path:
    """The checkpoint that a user names: `step_00000100` or `100`. Raises: CheckpointError listing those that exist."""
    there = checkpoints(run)
    for path in there:
        if name.strip("/") == path.name or (name.isdigit() and int(name) == step_of(path)):
            if not _may_be_resumed(path):
                raise CheckpointError(f"{path} was saved without optimizer state: a run cannot resume from it")
            return path
    names = ", ".join(path.name for path in reversed(there)) or "none"
    aside = "".join(f"; set aside: {note.name}" for note in notes(run))
    raise CheckpointError(f"{run.path} has no checkpoint {name!r}; there are: {names}{aside}")


def go_back(run: RunDirectory, name: str) -> list[SetAside]:
    """Makes the run resume from an older checkpoint, and sets the later ones aside.

    Raises: CheckpointError listing the existing ones.
    """
    chosen = find(run, name)
    later = [path for path in checkpoints(run) if step_of(path) > step_of(chosen)]
    # first of all, so that a run killed here still resumes from there
    write_atomic(run.latest, chosen.name + "\n")
    return settle(run, chosen, [], later)
