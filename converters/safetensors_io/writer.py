"""Writes one safetensors file, its tensors in any order, under a temporary name until it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from xxhash import xxh3_64

from megabatch.converters.atomic import sync_folder
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io.header import ITEMSIZE, build_header
from megabatch.errors import ConversionError
from megabatch.saved.manifest import File, Range
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes that were written one after the other."""

    name: str
    start: int
    digest: xxh3_64


class Writer:
    """A safetensors file whose tensors are known in advance; threads may share it.

        with Writer(path, entries) as writer:
            writer.write(name, data)

    The file gets its name when the block ends without an error and every byte was written; else it is removed.
    Raises: ConversionError for a full disk, bytes outside a tensor, bytes written twice and tensors left incomplete.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        header, self._extents = build_header(entries, metadata={"format": "pt", **(metadata or {})})
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in entries}
        self._parts: dict[int, _Part] = {}
        self._lock = threading.Lock()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._size = len(header) + sum(extent.size for extent in self._extents.values())
        self._file = self._create()
        try:
            os.ftruncate(self._file, self._size)
            self._pwrite(memoryview(header), 0)
            self._digest("header", memoryview(header), 0)
        except BaseException as error:
            self.abort()
            raise self._readable(error) if isinstance(error, OSError) else error from error

    def _create(self) -> int:
        try:
            free = shutil.disk_usage(self.path.parent).free
            if free < self._size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # 0o666 lets the umask decide, as for any file that a user makes
            return os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._readable(error) from error

    def write(
        self, name: str, data: bytes | bytearray | memoryview, *, row_start: int = 0, index: int | None = None
    ) -> None:
        """Writes consecutive whole rows of a tensor (of `index` of its first dimension), the first at `row_start`."""
        if name not in self._extents:
            raise ConversionError(f"{self.path}: no tensor {name} was announced")
        view = memoryview(data).cast("B")
        start = self._offset(name, row_start, index)
        self._reserve(name, start, start + view.nbytes)
        try:
            self._pwrite(view, self._extents[name].start + start)
        except OSError as error:
            raise self._readable(error) from error
        self._digest(name, view, self._extents[name].start + start)

    def _digest(self, name: str, view: memoryview, offset: int) -> None:
        """Adds the written bytes to their digest; bytes that directly follow earlier ones extend the same part."""
        if not view.nbytes:
            return
        with self._lock:
            before = self._parts.get(offset)
            follows = before is not None and before.name == name
            part = self._parts.pop(offset) if follows else _Part(name, offset, xxh3_64())
        part.digest.update(view)
        with self._lock:
            self._parts[offset + view.nbytes] = part

    def digests(self) -> File:
        """The digests of a closed file."""
        return File(
            self._size,
            tuple(
                Range(part.name, part.start, stop - part.start, part.digest.hexdigest())
                for stop, part in sorted(self._parts.items(), key=lambda entry: entry[0])
            ),
        )

    def _offset(self, name: str, row_start: int, index: int | None) -> int:
        """Byte inside the tensor."""
        info = self._extents[name].info
        shape, outer = info.shape, 0
        if index is not None:
            shape = shape[1:]
            outer = index * elements(shape)
        return (outer + row_start * elements(shape[1:])) * ITEMSIZE[info.dtype]

    def _reserve(self, name: str, start: int, stop: int) -> None:
        extent = self._extents[name]
        if start < 0 or stop > extent.size:
            raise ConversionError(
                f"{self.path}: bytes {start} to {stop} are outside {name} "
                f"{list(extent.info.shape)} {extent.info.dtype}, which has {extent.size}"
            )
        with self._lock:
            spans = self._written[name]
            if any(first < stop and start < last for first, last in spans):
                raise ConversionError(f"{self.path}: bytes {start} to {stop} of {name} are written twice")
            self._written[name] = _merged([*spans, (start, stop)])

    def _pwrite(self, view: memoryview, offset: int) -> None:
        while view.nbytes:
            count = os.pwrite(self._file, view, offset)
            view = view[count:]
            offset += count

    def close(self) -> None:
        """Checks that every byte was written, syncs, and gives the file its name."""
        try:
            for name, extent in self._extents.items():
                if extent.size and self._written[name] != [(0, extent.size)]:
                    done = sum(stop - start for start, stop in self._written[name])
                    raise ConversionError(f"{self.path}: {name} is incomplete: {done} of {extent.size} bytes written")
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except BaseException as error:
            self.abort()
            raise self._readable(error) if isinstance(error, OSError) else error from error

    def abort(self) -> None:
        """Closes and removes the unfinished file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _readable(self, error: OSError) -> ConversionError:
        if error.errno == errno.ENOSPC:
            return ConversionError(f"{self.path}: disk full: {self._size} bytes are needed; free space and run again")
        return ConversionError(f"{self.path}: cannot be written: {error.strerror}")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with touching ones joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged
