"""What a path to a checkpoint may mean; trainer, converters and the checks before the queue ask here.

    path                                      checkpoint
    a folder with .metadata                   itself: torch_dist of any program, or `mcore/` of a run's checkpoint
    a run's checkpoint (step_*)               itself, with its weights in mcore/
    a folder with Megatron-LM's tracker file  the iter_* or release that latest_checkpointed_iteration.txt names
    a folder with step_*                      the one that `latest` names, the newest where it names none that is there
    a folder with checkpoints/                what the last two rules find in there

The first matching row decides. If a row matches but leads to nothing, that is an error; we never try the next row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megabatch.did_you_mean import did_you_mean
from megabatch.errors import CheckpointError
from megabatch.saved import history
from megabatch.saved.history import HF, MCORE, TRAINER
from megabatch.saved.manifest import read_manifest
from megabatch.values import dataclass

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
"""Megatron-LM's file beside `iter_0000100/` or `release/` that names the newest, and the name of a checkpoint that did
not come from training."""
_METADATA = ".metadata"
_TRACKER_BYTES = 1000
_SHOWN = 8


class NoCheckpointError(CheckpointError):
    """A path has no checkpoint at all, not even a damaged one."""


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """An existing checkpoint."""

    folder: Path
    """A run's checkpoint, or the torch_dist folder of another program."""
    weights: Path
    """The torch_dist folder, with `.metadata`."""

    @property
    def of_a_run(self) -> bool:
        """Whether it holds the run's progress besides the weights."""
        return (self.folder / TRAINER).is_file()


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """The checkpoint at a path, by the table above.

    Raises: NoCheckpointError for a path without one, listing what is there; CheckpointError for a path that leads to
    nothing, or to a damaged checkpoint.
    """
    try:
        return _meant_by(path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e


def _meant_by(path: Path) -> FoundCheckpoint:
    if not path.is_dir():
        raise NoCheckpointError(f"there is no folder {path}{did_you_mean(path)}")
    for folder, meanings in ((path, _MEANINGS), (path / "checkpoints", _OF_MANY)):
        for meaning in meanings:
            if (found := meaning(folder)) is not None:
                return found
    raise NoCheckpointError(
        f"{path} holds no checkpoint; it has {_listed(path)}. Give a run directory, one of its step_* folders, or a "
        f"folder in megatron-core's torch_dist format (with {_METADATA}, or with Megatron-LM's {TRACKER})"
    )


def find_to_load(load: str, *, may_be_missing: bool) -> FoundCheckpoint | None:
    """The checkpoint of `checkpoint.load`; None if there is none and none is required (`exit_on_missing_checkpoint`).

    Raises: CheckpointError.
    """
    try:
        return find_checkpoint(Path(load).expanduser())
    except NoCheckpointError as error:
        if may_be_missing:
            return None
        raise NoCheckpointError(f"{error}; or set exit_on_missing_checkpoint=False to start from the model") from error


def _torch_dist(folder: Path) -> FoundCheckpoint | None:
    if not (folder / _METADATA).is_file():
        return None
    is_part = folder.absolute().name == MCORE and (folder.absolute().parent / TRAINER).is_file()
    return FoundCheckpoint(folder.absolute().parent if is_part else folder, folder)


def _of_run(folder: Path) -> FoundCheckpoint | None:
    if (folder / MCORE / _METADATA).is_file():
        return FoundCheckpoint(folder, folder / MCORE)
    if history.is_checkpoint(folder.absolute()) or (folder / TRAINER).is_file():
        raise CheckpointError(f"{folder} {_why_without_weights(folder)}")
    return None


def _why_without_weights(step: Path) -> str:
    try:
        manifest = read_manifest(step)
    except CheckpointError as error:
        return f"is damaged: {error}; load an older one, step_*"
    if manifest is None or manifest.below(MCORE):
        return f"is damaged: {MCORE}/{_METADATA}: is missing; load an older one, step_*"
    return f"was saved with no_save_optim, without {MCORE}/; its weights are in {step / HF}, a Hugging Face folder"


def _tracked(folder: Path) -> FoundCheckpoint | None:
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    with open(tracker, "rb") as file:
        text = file.read(_TRACKER_BYTES).decode("utf-8", errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise CheckpointError(f"{tracker} says {text[:40]!r}, which is neither a number of iterations nor {RELEASE!r}")
    named = folder / (text if text == RELEASE else f"iter_{int(text):07d}")
    if not named.is_dir():
        raise CheckpointError(f"{tracker} names {named.name}, which is not there; {folder} has {_listed(folder)}")
    if not (named / _METADATA).is_file():
        raise CheckpointError(f"{named} has no {_METADATA}: of Megatron-LM's formats only torch_dist is read")
    return FoundCheckpoint(named, named)


def _newest_of_run(folder: Path) -> FoundCheckpoint | None:
    newest = history.newest_in(folder)
    return None if newest is None else _of_run(newest)


def _listed(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "no files"


_OF_MANY: tuple[Callable[[Path], FoundCheckpoint | None], ...] = (_tracked, _newest_of_run)
_MEANINGS = (_torch_dist, _of_run, *_OF_MANY)
