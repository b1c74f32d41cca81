"""Reading torch_dist files: each item once, checked against its digest before anything is made of it.

A rank checks exactly the bytes that it loads: it reads an item of a `.distcp` into memory, compares its digest, and
only then unpickles it and copies it to its destination. Loading does not read, and so not check, what no rank needs;
`megabatch checkpoint verify` checks that too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megabatch.saved.manifest import DamagedError, Digest, Manifest, Range, UnreadableError, read_file
from megabatch.trainer.checkpoints.unpickling import read_metadata
from megabatch.trainer.checkpoints.writing import COMMON, CONFIG, METADATA

SMALL = (COMMON, CONFIG)
"""Files that megatron-core reads by itself, not through `Reader`."""
_BLOCK_BYTES = 1 << 20
"""Bytes read at a time, so that they are still in the processor's cache when we digest them."""


class Reader(FileSystemReader):
    """Reads one folder for one rank; `.metadata` is read once."""

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        """`manifest`: the checkpoint's; None loads without checks.

        Raises: DamagedError; UnreadableError; CheckpointError for a `.metadata` that holds more than data.
        """
        super().__init__(folder)
        self._manifest = manifest
        self._prefix = "" if manifest is None or manifest.folder == folder else f"{folder.name}/"
        self._ranges: dict[str, dict[int, Range]] = {}
        self._buffers = [bytearray(), bytearray()]  # one for the item in use, one for the item being read
        self._metadata = read_metadata(self._small(folder / METADATA))

    def _small(self, path: Path) -> bytes:
        name = self._prefix + path.name
        try:
            data = read_file(path, name)
        except FileNotFoundError as e:
            raise DamagedError(f"{name}: is missing") from e
        if self._manifest is not None:
            self._manifest.require(name, data)
        return data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Loads what the planner asks for. Raises: DamagedError before a damaged item is used; UnreadableError."""
        files: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for request in plan.items:
            place = self.storage_data[request.storage_index]
            items = files.setdefault(place.relative_path, {})
            items.setdefault((place.offset, place.length), []).append(request)
        for name, items in files.items():
            with _opened(Path(self.path) / name, self._prefix + name) as file:
                places = sorted(items)
                for place, data in zip(places, self._items(file, name, places), strict=True):
                    _hand_over(data, items[place], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _items(self, file: int, name: str, places: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """The items of a file. Reads and checks the next item while one is in use; each is valid until the next."""
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(self._item, file, name, *places[0])]
            for place in places[1:]:
                data = coming.pop(0).result()
                coming.append(ahead.submit(self._item, file, name, *place))
                yield data
            yield coming.pop(0).result()

    def _item(self, file: int, name: str, offset: int, length: int) -> memoryview:
        self._buffers.reverse()
        if len(self._buffers[0]) < length:
            self._buffers[0] = bytearray(length)
        data = memoryview(self._buffers[0])[:length]
        digest = None if self._manifest is None else self._manifest.digest()
        try:
            missing = _read_into(data, file, offset, digest)
        except OSError as e:
            raise UnreadableError.of(Path(self.path) / name, e) from e
        if missing > 0:
            raise DamagedError(f"{self._prefix}{name}: ends {missing} bytes early")
        if self._manifest is not None and digest is not None:
            known = self._ranges_of(self._prefix + name, self._manifest).get(offset)
            if known is None or known.size != length:
                raise DamagedError(f"{self._prefix}{name}: bytes {offset} to {offset + length} are not part of it")
            self._manifest.require_digest(self._prefix + name, known, digest)
        return data

    def _ranges_of(self, name: str, manifest: Manifest) -> Mapping[int, Range]:
        if name not in self._ranges:
            if name not in manifest.files:
                raise DamagedError(f"{name}: is not in the manifest")
            self._ranges[name] = {part.offset: part for part in manifest.files[name].ranges}
        return self._ranges[name]


@contextmanager
def through(reader: Reader) -> Iterator[None]:
    """Makes megatron-core (0.16 to 0.19) read with `reader`: it creates its own readers and accepts none."""
    made = torch_strategies._get_filesystem_reader
    torch_strategies._get_filesystem_reader = lambda *_, **__: reader
    try:
        yield
    finally:
        torch_strategies._get_filesystem_reader = made


@contextmanager
def _opened(path: Path, name: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise DamagedError(f"{name}: is missing") from e
    except OSError as e:
        raise UnreadableError.of(path, e) from e
    try:
        yield file
    finally:
        os.close(file)


def _read_into(data: memoryview, file: int, offset: int, digest: Digest | None) -> int:
    """Fills `data` and updates the digest; returns how many bytes the file lacks."""
    while data.nbytes and (count := os.preadv(file, [data[:_BLOCK_BYTES]], offset)):
        if digest is not None:
            digest.update(data[:count])
        data, offset = data[count:], offset + count
    return data.nbytes


class _Memory(io.RawIOBase):
    """A file over bytes in memory, without copying them."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._data.nbytes}[whence]
        return self._at

    def readinto(self, into: Any) -> int:
        target = memoryview(into).cast("B")
        part = self._data[self._at : self._at + target.nbytes]
        target[: part.nbytes] = part
        self._at += part.nbytes
        return part.nbytes


def _hand_over(data: memoryview, requests: list[ReadItem], planner: LoadPlanner) -> None:
    """Gives an item to every request for it or for a part of it."""
    if requests[0].type == LoadItemType.BYTE_IO:
        for request in requests:
            planner.load_bytes(request, io.BytesIO(data))
        return
    tensor = torch.load(_Memory(data), map_location="cpu", weights_only=True)
    for request in requests:
        part = tensor
        for dim, (start, size) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        target = planner.resolve_tensor(request).detach()
        target.copy_(part)
        planner.commit_tensor(request, target)
