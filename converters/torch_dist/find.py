"""Finds the torch_dist folder in a run, a step, or a folder with a tracker file."""

from __future__ import annotations

import os
from pathlib import Path

from megabatch.errors import CheckpointError, ConversionError
from megabatch.saved.find import find_checkpoint


def find_torch_dist(path: str | os.PathLike[str]) -> Path:
    """The folder with `.metadata` of the checkpoint that a path means (`saved.find`). Raises: ConversionError."""
    try:
        return find_checkpoint(Path(path)).weights
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
