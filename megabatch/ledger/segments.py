"""Files of a ledger: segments of frames, each frame the compressed completions of one optimizer step.

A frame is a header (mark, step, completions, bytes, CRC-32 of the bytes) and what zlib made of the records. Frames are
only ever appended, each in one write; a writer that is killed leaves at most one torn frame, at the end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<4sIIQI")
MARK = b"MBL1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Where a step's completions are."""

    file: Path
    offset: int
    """Of the header."""
    step: int
    count: int
    """Completions."""
    size: int
    """Bytes after the header."""
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + HEADER.size + self.size

    def content(self) -> bytes | None:
        """The records' bytes; None if they are damaged."""
        with open(self.file, "rb") as file:
            file.seek(self.offset + HEADER.size)
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
    return HEADER.pack(MARK, step, count, len(body), zlib.crc32(body)) + body


def frames(file: Path) -> Iterator[Frame]:
    """The frames of a segment up to its end, or to the first that is torn; contents are not read."""
    total = file.stat().st_size
    offset = 0
    with open(file, "rb") as opened:
        while total - offset >= HEADER.size:
            opened.seek(offset)
            mark, step, count, size, checksum = HEADER.unpack(opened.read(HEADER.size))
            frame = Frame(file=file, offset=offset, step=step, count=count, size=size, checksum=checksum)
            if mark != MARK or frame.end > total:
                return
            yield frame
            offset = frame.end
