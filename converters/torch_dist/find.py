"""From what people name (a run, a step, a folder with a tracker file) to the torch_dist folder in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megabatch.converters.nearest import did_you_mean
from megabatch.converters.regular import read_regular
from megabatch.errors import ConversionError

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
"""Megatron-LM's file beside `iter_0000100/` or `release/` that says which is the newest, and the name of a checkpoint
that no training made."""
_METADATA = ".metadata"
_TRACKER_BYTES = 1000


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder with `.metadata`: `path` itself, or the newest checkpoint below it.

    `path` may be a run directory of ours, its `checkpoints/`, one `step_*/`, or the folder that Megatron-LM and
    ms-swift save to.
    Raises: ConversionError naming what is there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder of a checkpoint{did_you_mean(folder)}")
    for found in _candidates(folder):
        if (found / _METADATA).is_file():
            return found
    there = sorted(child.name for child in folder.iterdir())[:8]
    raise ConversionError(
        f"{folder}: no torch_dist checkpoint (a folder with .metadata) in it; it has {', '.join(there) or 'no files'}"
    )


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder / "mcore"
    for parent in (folder, folder / "checkpoints"):
        if (newest := _newest(parent)) is not None:
            yield newest
            yield newest / "mcore"


def _newest(folder: Path) -> Path | None:
    """The checkpoint that a tracker file names: Megatron-LM's, or the `latest` of a run of ours."""
    if (text := _text(folder / TRACKER)) is not None:
        return folder / (text if text == RELEASE else f"iter_{int(text):07d}" if text.isdecimal() else "")
    if (text := _text(folder / "latest")) is not None and "/" not in text:
        return folder / text
    return None


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return read_regular(path, most=_TRACKER_BYTES).decode("utf-8").strip()
    except ValueError:
        return None
