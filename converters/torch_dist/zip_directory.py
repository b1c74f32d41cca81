"""The directory of an uncompressed zip archive inside a file: its members and where their bytes are.

A checkpoint of a large model has a hundred thousand archives; the standard library's reader would take most of the
time that planning has. Two reads of a few kilobytes open an archive here.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple

_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_NEAR = 4096
"""Bytes read at once at either end; torch's directory and its first members lie within."""
_LARGEST = 1 << 20
"""Bytes of a directory, or of a member that is read, in the archive of one tensor."""
_WIDE = 0xFFFFFFFF
_NEXT = (b"PK\x03\x04", b"PK\x01\x02")
"""What follows a member: another one, or the directory."""


class Member(NamedTuple):
    """An uncompressed member."""

    size: int
    crc: int
    header: int
    """Offset of its local header."""
    described: bool
    """Whether sizes and checksum are repeated after its bytes."""


class ZipDirectory:
    """The members of the archive in `length` bytes of a file from `start` on.

    Raises: ValueError for whatever is no such archive; OSError.
    """

    def __init__(self, file: int, start: int, length: int, *, largest: int = _LARGEST) -> None:
        self._file, self._start, self._length, self._largest = file, start, length, largest
        self._head = os.pread(file, min(_NEAR, length), start)
        self._tail_at = max(0, length - _NEAR)
        self._tail = os.pread(file, min(_NEAR, length), start + self._tail_at)
        self.members = dict(self._members())

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._length:
            raise ValueError(f"bytes {offset} to {offset + size} are outside of its {self._length}")
        if offset + size <= len(self._head):
            return self._head[offset : offset + size]
        if offset >= self._tail_at:
            found = self._tail[offset - self._tail_at : offset - self._tail_at + size]
        else:
            found = os.pread(self._file, size, self._start + offset)
        if len(found) != size:
            raise ValueError("truncated")
        return found

    def _members(self) -> dict[str, Member]:
        count, size, offset = self._end()
        if size > self._largest:
            raise ValueError(f"a directory of {size} bytes")
        raw, at, found = self._bytes(offset, size), 0, {}
        for _ in range(count):
            name, member, at = _member(raw, at)
            found[name] = member
        return found

    def _end(self) -> tuple[int, int, int]:
        """Number of members, size and offset of the directory."""
        at = self._length - _END.size
        magic, _, _, _, count, size, offset, _ = _END.unpack(self._bytes(at, _END.size))
        if magic != b"PK\x05\x06":
            raise ValueError("not a zip archive, or a truncated one")
        if _WIDE in (size, offset) or count == 0xFFFF:
            magic, _, place, _ = _LOCATOR.unpack(self._bytes(at - _LOCATOR.size, _LOCATOR.size))
            fields = _END64.unpack(self._bytes(place, _END64.size))
            if magic != b"PK\x06\x07" or fields[0] != b"PK\x06\x06":
                raise ValueError("a broken directory of a large archive")
            count, size, offset = fields[-3:]
        return count, size, offset

    def data_offset(self, name: str) -> int:
        """Where a member's bytes begin; only its local header says how long that header is. Raises: KeyError."""
        header = self.members[name].header
        fields = _LOCAL.unpack(self._bytes(header, _LOCAL.size))
        found = self._bytes(header + _LOCAL.size, fields[-2])
        if fields[0] != b"PK\x03\x04" or found != name.encode():
            raise ValueError(f"{name} without its header")
        start = int(header + _LOCAL.size + fields[-2] + fields[-1])
        end = start + self.members[name].size
        if self._bytes(end, 4) not in ((b"PK\x07\x08",) if self.members[name].described else _NEXT):
            raise ValueError(f"{name} does not end where it should")
        return start

    def read(self, name: str) -> bytes:
        """A member's bytes, its checksum compared unless torch was told to write none. Raises: KeyError."""
        member = self.members[name]
        if member.size > self._largest:
            raise ValueError(f"{name} has {member.size} bytes")
        raw = self._bytes(self.data_offset(name), member.size)
        if member.crc and zlib.crc32(raw) != member.crc:
            raise ValueError(f"{name} is corrupt: its checksum differs")
        return raw


def _member(raw: bytes, at: int) -> tuple[str, Member, int]:
    """The entry of the directory at a byte, and where the next one begins."""
    if at + _CENTRAL.size > len(raw):
        raise ValueError("a truncated directory")
    magic, _, _, flags, method, _, _, crc, stored, size, name, extra, comment, _, _, _, header = _CENTRAL.unpack_from(
        raw, at
    )
    names = at + _CENTRAL.size
    extras = names + name
    following = extras + extra + comment
    if magic != b"PK\x01\x02" or following > len(raw):
        raise ValueError("a broken directory")
    if method != 0 or flags & 1:
        raise ValueError("compressed or encrypted members")
    size, stored, header = _wide(raw[extras : extras + extra], size, stored, header)
    if size != stored:
        raise ValueError("members of two sizes")
    return raw[names:extras].decode(), Member(size, crc, header, bool(flags & 8)), following


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """Sizes and offset, those that need more than 32 bits from the extra field."""
    if _WIDE not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            return tuple(next(wide, value) if value == _WIDE else value for value in values)
        at += 4 + size
    raise ValueError("sizes that are missing")
