"""Files of a ledger: segments of frames, each frame the compressed completions of one optimizer step.

A frame is a header (mark, step, completions, bytes, CRC-32 of the bytes, CRC-32 of the header before it) and what zlib
made of the records. Frames are only ever appended, each in one write; a writer that is killed leaves at most one torn
frame, at the end. Older frames have the mark MBL1, and no checksum of their header.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megabatch.values import dataclass

_FIELDS = struct.Struct("<4sIIQI")
_SUM = struct.Struct("<I")
_MARK, _UNSUMMED, _MARKED = b"MBL2", b"MBL1", b"MBL"
"""What a frame begins with, what an older one does, and what both have in common."""
_PART = 2**20
"""Bytes that are searched for a mark at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Where a step's completions are."""

    file: Path
    offset: int
    """Of the header."""
    body: int
    """Of the bytes after it."""
    step: int
    count: int
    """Completions."""
    size: int
    """Bytes after the header."""
    checksum: int

    @property
    def end(self) -> int:
        return self.body + self.size

    def content(self) -> bytes | None:
        """The records' bytes; None if they are damaged."""
        with open(self.file, "rb") as file:
            file.seek(self.body)
            packed = file.read(self.size)
        if len(packed) < self.size or zlib.crc32(packed) != self.checksum:
            return None
        return zlib.decompress(packed)


def segments(folder: Path) -> list[Path]:
    """The files of a ledger, oldest first."""
    return sorted(folder.glob("[0-9]*.ledger"))


def segment(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.ledger"


def packed(step: int, count: int, content: bytes) -> bytes:
    """A whole frame."""
    body = zlib.compress(content, 3)
    header = _FIELDS.pack(_MARK, step, count, len(body), zlib.crc32(body))
    return header + _SUM.pack(zlib.crc32(header)) + body


def frames(file: Path) -> Iterator[Frame]:
    """The whole frames of a segment; contents are read only beside bytes that are no frame.

    Damage costs the frame that has it: the search goes on at the next mark behind it.
    """
    total = file.stat().st_size
    offset: int | None = 0
    with open(file, "rb") as opened:
        while offset is not None and total - offset >= _FIELDS.size:
            frame = _frame_at(opened, file, offset)
            whole = frame is not None and frame.end <= total
            if frame is not None and whole and (_begins_at(opened, frame.end) or frame.content() is not None):
                yield frame
                offset = frame.end
            else:
                offset = _next_mark(opened, offset + 1)


def _frame_at(opened: BinaryIO, file: Path, offset: int) -> Frame | None:
    opened.seek(offset)
    header, own = opened.read(_FIELDS.size), opened.read(_SUM.size)
    mark, step, count, size, checksum = _FIELDS.unpack(header)
    if mark not in (_MARK, _UNSUMMED) or (mark == _MARK and own != _SUM.pack(zlib.crc32(header))):
        return None
    body = offset + _FIELDS.size + (_SUM.size if mark == _MARK else 0)
    return Frame(file=file, offset=offset, body=body, step=step, count=count, size=size, checksum=checksum)


def _begins_at(opened: BinaryIO, offset: int) -> bool:
    """Whether a frame begins here, if only its first bytes, or the segment ends."""
    opened.seek(offset)
    begins = opened.read(len(_MARK))
    return _MARK.startswith(begins) or _UNSUMMED.startswith(begins)


def _next_mark(opened: BinaryIO, offset: int) -> int | None:
    """Where the next mark is, from `offset` on."""
    before = b""
    opened.seek(offset)
    while part := opened.read(_PART):
        if (place := (before + part).find(_MARKED)) >= 0:
            return offset - len(before) + place
        offset += len(part)
        before = part[-len(_MARKED) + 1 :]
    return None
