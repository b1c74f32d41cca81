"""Changes to checkpoint folders, made by the main rank alone: begin it, make it one of the run's, forget older
ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megabatch.errors import CheckpointError
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.saved import history
from megabatch.saved.history import HF, MCORE, TRAINER
from megabatch.saved.manifest import MANIFEST, File, manifest_text, read_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is saved and what is kept."""

    no_save_optim: bool = False
    no_save_rng: bool = False
    save_retain_interval: int | None = None
    """In steps, or in epochs."""
    save_total_limit: int | None = None
    by_epochs: bool = False


def temporary_of(target: Path) -> Path:
    """The folder in which a checkpoint is written before we rename it."""
    return target.with_name(f".{target.name}.tmp")


def begin(temporary: Path) -> None:
    """Raises: CheckpointError."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in (MCORE, HF):
            (temporary / name).mkdir(parents=True)
    except OSError as e:
        raise CheckpointError(f"{temporary}: {e.strerror or e}") from e


def commit(
    run: RunDirectory, temporary: Path, target: Path, files: Mapping[str, File], *, texts: Mapping[str, str]
) -> None:
    """Writes small files and the manifest, syncs all folders, points `latest` to the folder and renames it.

    `latest` comes first: killed between the two, the run resumes from the checkpoint before, whereas one that is newer
    than what `latest` names would be taken for a history that the run has abandoned.

    Args: files: those of all ranks, by path in the folder; texts: contents of the small files, by path.
    Raises: CheckpointError.
    """
    try:
        for name, text in texts.items():
            write_atomic(temporary / name, text)
        small = {name: File.of(text.encode()) for name, text in texts.items()}
        write_atomic(temporary / MANIFEST, manifest_text({**files, **small}))
        _sync_folders(temporary)
        if target.exists():  # from before the run went back; a kill between the two renames loses nothing
            history.set_aside(run, target, "later", why=_again(target), went_on=target.name)
        write_atomic(run.latest, target.name + "\n")
        os.replace(temporary, target)
        _sync(target.parent)
        for note in history.notes(run):  # also of an attempt that was killed before it came here
            if note.why == _again(target):
                shutil.rmtree(target.with_name(note.name), ignore_errors=True)
    except OSError as e:
        raise CheckpointError(f"{target}: {e.strerror or e}") from e


def _again(target: Path) -> str:
    """Why a checkpoint makes room for a new one of its step."""
    return f"step {history.step_of(target)} was reached again"


def forget(run: RunDirectory, step: int, retention: Retention) -> None:
    """Deletes the checkpoints that `save_retain_interval` and `save_total_limit` do not keep. Always keeps the newest,
    that of `step`, and the best, which counts towards the limit."""
    best = history.named_by_best(run)
    older = [p for p in reversed(history.checkpoints(run)) if history.step_of(p) < step and p != best]
    keep_every, keep_last = retention.save_retain_interval, retention.save_total_limit
    doomed = [p for p in older if keep_every is not None and not _is_kept(p, keep_every, retention)]
    if keep_last is not None:
        keep_last -= best is not None and history.step_of(best) < step
        kept = [p for p in older if p not in doomed]
        doomed += kept[: max(0, len(kept) + 1 - max(1, keep_last))]
    for path in doomed:
        _delete(path)


def _delete(path: Path) -> None:
    """Renames it first: what a kill leaves of it has no checkpoint's name, and the next attempt deletes it."""
    temporary = temporary_of(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.rename(path, temporary)
    except OSError:
        temporary = path
    shutil.rmtree(temporary, ignore_errors=True)


def _is_kept(path: Path, every: int, retention: Retention) -> bool:
    if not retention.by_epochs:
        return history.step_of(path) % every == 0
    try:
        ended = int(json.loads(read_file(path / TRAINER, TRAINER)).get("ended_epoch", 0))
    except (CheckpointError, OSError, ValueError):
        return True  # never delete what we cannot read
    return ended > 0 and ended % every == 0


def room(run: RunDirectory) -> str:
    """Free disk space and what to do about it, in words."""
    free = shutil.disk_usage(run.path).free / 2**20
    return f"{free:.0f} MiB are free there; if that is not enough, save elsewhere or set checkpoint.save_total_limit"


def _sync_folders(folder: Path) -> None:
    """Syncs all folders below it, so that file names are durable; the ranks synced the files themselves."""
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        if not any(path.iterdir()):
            path.rmdir()  # a part that this checkpoint does not have
        else:
            _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
