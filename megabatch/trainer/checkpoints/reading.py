"""Reading torch_dist files: each item once, checked against its digest before anything is made of it.

A rank checks exactly the bytes that it loads: an item of a `.distcp` is read into memory, its digest is compared, and
only then is it unpickled and copied to where it belongs. What no rank loads is not read; `megabatch checkpoint verify`
checks that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megabatch.saved.manifest import DamagedError, Manifest, Range
from megabatch.trainer.checkpoints.unpickling import read_metadata
from megabatch.trainer.checkpoints.writing import COMMON, CONFIG, METADATA

SMALL = (COMMON, CONFIG)
"""What megatron-core reads itself, besides what `Reader` does."""


class Reader(FileSystemReader):
    """Reads one folder for one rank; `.metadata` is read once."""

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        """`manifest`: of the checkpoint; None loads what cannot be checked.

        Raises: DamagedError, OSError, CheckpointError for a `.metadata` that is more than data.
        """
        super().__init__(folder)
        self._manifest = manifest
        self._prefix = "" if manifest is None or manifest.folder == folder else f"{folder.name}/"
        self._ranges: dict[str, dict[int, Range]] = {}
        self._metadata = read_metadata(self._small(folder / METADATA))

    def _small(self, path: Path) -> bytes:
        try:
            data = path.read_bytes()
        except FileNotFoundError as e:
            raise DamagedError(f"{self._prefix}{path.name}: is missing") from e
        if self._manifest is not None:
            self._manifest.require(self._prefix + path.name, data)
        return data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills what the planner asks for. Raises: DamagedError before a damaged item is used."""
        files: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for request in plan.items:
            place = self.storage_data[request.storage_index]
            items = files.setdefault(place.relative_path, {})
            items.setdefault((place.offset, place.length), []).append(request)
        for name, items in files.items():
            with _opened(Path(self.path) / name, self._prefix + name) as file:
                for (offset, length), requests in sorted(items.items()):
                    _hand_over(self._item(file, name, offset, length), requests, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _item(self, file: int, name: str, offset: int, length: int) -> bytes:
        data = _read(file, offset, length)
        if len(data) != length:
            raise DamagedError(f"{self._prefix}{name}: ends {length - len(data)} bytes early")
        if self._manifest is not None:
            known = self._ranges_of(self._prefix + name, self._manifest).get(offset)
            if known is None or known.size != length:
                raise DamagedError(f"{self._prefix}{name}: bytes {offset} to {offset + length} are no part of it")
            self._manifest.require_range(self._prefix + name, known, data)
        return data

    def _ranges_of(self, name: str, manifest: Manifest) -> Mapping[int, Range]:
        if name not in self._ranges:
            if name not in manifest.files:
                raise DamagedError(f"{name}: is not in the manifest")
            self._ranges[name] = {part.offset: part for part in manifest.files[name].ranges}
        return self._ranges[name]


@contextmanager
def through(reader: Reader) -> Iterator[None]:
    """Within it megatron-core reads with `reader` (0.16 to 0.19; it makes readers of its own and takes none)."""
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
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes; fewer at the file's end."""
    parts = []
    while length and (part := os.pread(file, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _hand_over(data: bytes, requests: list[ReadItem], planner: LoadPlanner) -> None:
    """Gives one item to all that want it, or a part of it."""
    if requests[0].type == LoadItemType.BYTE_IO:
        for request in requests:
            planner.load_bytes(request, io.BytesIO(data))
        return
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for request in requests:
        part = tensor
        for dim, (start, size) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        target = planner.resolve_tensor(request).detach()
        target.copy_(part)
        planner.commit_tensor(request, target)
