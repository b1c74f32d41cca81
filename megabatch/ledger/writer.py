"""Appends the completions of each optimizer step to a run's ledger, within a limit of disk space."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megabatch.errors import RewardError
from megabatch.ledger.record import Record, encode
from megabatch.ledger.segments import frames, packed, segment, segments

_log = logging.getLogger(__name__)
SEGMENT_BYTES = 64 * 2**20


class Ledger:
    """One writer at a time: the main rank."""

    def __init__(self, folder: Path, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Cuts a torn frame that a killed writer left.

        Args: the oldest segments are deleted once all take more than `max_bytes`; the newest always stays.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._segment_bytes = min(segment_bytes, max(1, max_bytes // 4))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = next(reversed(segments(folder)), segment(folder, 0))
        _cut_torn(self._file)

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Appends what step `step` was trained on; a step that is written again, after a resume, replaces this and all
        later steps for readers. A full disk costs this step, which the log says, and not the run.

        Raises: RewardError for a completion that is in `records` twice.
        """
        keys = [record.key for record in records]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RewardError(f"completion {twice} is twice in step {step}; each may be used once in a step")
        frame = packed(step, len(records), encode(records))
        if self._file.exists() and self._file.stat().st_size + len(frame) > self._segment_bytes:
            self._file = segment(self._folder, int(self._file.stem) + 1)
        try:
            _append(self._file, frame)
            self._delete_oldest()
        except OSError as error:
            _log.warning("step %d is missing from %s: %s", step, self._folder, error.strerror or error)

    def _delete_oldest(self) -> None:
        files = segments(self._folder)
        sizes = [file.stat().st_size for file in files]
        for file, size in zip(files[:-1], sizes[:-1], strict=True):
            if sum(sizes) <= self._max_bytes:
                return
            file.unlink()
            sizes.remove(size)


def _append(path: Path, frame: bytes) -> None:
    """All of the frame or, on a full disk, nothing."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            left = memoryview(frame)
            while left:
                left = left[file.write(left) :]
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def _cut_torn(file: Path) -> None:
    """Cuts a segment after its last frame whose bytes are all there and match their checksum; frames before it stay,
    damaged ones too."""
    if not file.exists():
        return
    end = next((frame.end for frame in reversed(list(frames(file))) if frame.content() is not None), 0)
    if end < (size := file.stat().st_size):
        _log.warning("%s: cut %d bytes that a killed writer had left of a step", file, size - end)
        os.truncate(file, end)
