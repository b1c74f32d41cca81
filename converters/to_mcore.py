"""Hugging Face safetensors → megatron-core torch_dist: byte extents moved to places known beforehand.

Plan, execute, commit: every size and offset is known before a byte is written, data goes to its place in any order
from several threads, `.metadata`, without which no loader accepts the folder, is written last, and then the folder
gets its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megabatch.converters.atomic import new_folder, replacing
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.torch_dist.archive import Archive, tensor_record
from megabatch.converters.torch_dist.keys import Cell, cell, extra_states, stacks_layers
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, dump_metadata
from megabatch.converters.torch_dist.pickle_codec import dump
from megabatch.errors import ConversionError

_BUFFER_BYTES = 4 << 20
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor on its way: which bytes, and where its archive lies."""

    mapped: Mapped
    cell: Cell
    dtype: str
    file: int
    offset: int
    archive: Archive


@dataclass(frozen=True, slots=True)
class Plan:
    """All that will be written; `sizes` are the files' lengths."""

    items: list[Item]
    sizes: list[int]
    empty: Archive
    """The object that every `_extra_state` holds; one archive serves all, at the end of the first file."""
    states: list[str]

    @property
    def total(self) -> int:
        """Bytes of tensor files."""
        return sum(self.sizes) + self.empty.total


def plan_to_mcore(model: HfModel, *, files: int = 2) -> Plan:
    """Deals the model's tensors to `files` files; nothing is read or written."""
    stacked = stacks_layers(model.shape)
    sizes = [0] * files
    items = []
    for mapped in model.tensors:
        place = cell(mapped, model.shape, stacked=stacked)
        dtype = model.folder.info(next(mapped.pieces).hf).dtype
        count = elements(mapped.shape)
        shape = (1,) * len(place.lead) + mapped.shape
        archive = Archive.of_tensor(dtype, shape, count=count, size=count * ITEMSIZE[dtype])
        file = sizes.index(min(sizes))
        items.append(Item(mapped, place, dtype, file, sizes[file], archive))
        sizes[file] += archive.total
    states = list(extra_states(model.tensors, model.shape, stacked=stacked))
    # what torch.save writes for [torch.empty(0, dtype=uint8)], the state of a layer without FP8
    return Plan(items, sizes, Archive(dump([tensor_record("ByteStorage", (0,), 0)]), 0), states)


def to_mcore(
    hf_folder: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int = 2, files: int = 2
) -> Plan:
    """Converts a folder; the output must not exist or be empty. Returns the executed plan.

    Raises: ConversionError; there is no output then.
    """
    model = open_hf_model(hf_folder)
    plan = plan_to_mcore(model, files=files)
    _entries(plan.items)  # its faults are found before a byte is written
    target = Path(output)
    try:
        with new_folder(target) as staged:
            if shutil.disk_usage(staged).free < plan.total:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _execute(model, plan, staged, workers)
            _commit(plan, staged)
    except OSError as error:
        text = "disk full" if error.errno == errno.ENOSPC else f"cannot be written: {error.strerror}"
        raise ConversionError(f"{target}: {text}; {plan.total} bytes are needed") from error
    finally:
        model.folder.close()
    return plan


def _file_name(file: int) -> str:
    return f"__0_{file}.distcp"


def _execute(model: HfModel, plan: Plan, target: Path, workers: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    files = [os.open(target / _file_name(i), flags, 0o666) for i in range(len(plan.sizes))]
    try:
        for file, size in zip(files, plan.sizes, strict=True):
            os.ftruncate(file, size)
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda item: _move(model, item, files[item.file]), plan.items):
                pass
        empty = plan.empty.prefix(0) + plan.empty.suffix(0)
        _pwrite(files[0], memoryview(empty), plan.sizes[0])
        for file in files:
            os.fsync(file)
    finally:
        for file in files:
            os.close(file)


def _move(model: HfModel, item: Item, file: int) -> None:
    """Writes one archive: the pieces' bytes one after the other, and around them what depends on their checksum."""
    crc, at = 0, item.offset + item.archive.data_offset
    for block in _blocks(model, item.mapped):
        crc = zlib.crc32(block, crc)
        _pwrite(file, block, at)
        at += block.nbytes
    _pwrite(file, memoryview(item.archive.prefix(crc)), item.offset)
    _pwrite(file, memoryview(item.archive.suffix(crc)), at)


def _blocks(model: HfModel, mapped: Mapped) -> Iterator[memoryview]:
    """The tensor's bytes in order, a few megabytes at a time."""
    row_bytes = elements(mapped.shape[1:]) * model.folder.itemsize(next(mapped.pieces).hf)
    step = max(1, _BUFFER_BYTES // row_bytes)
    buffer = memoryview(bytearray(step * row_bytes))
    for piece in mapped.pieces:
        for first in range(*piece.rows, step):
            last = min(first + step, piece.rows[1])
            block = buffer[: (last - first) * row_bytes]
            model.folder.read_into(piece.hf, block, rows=(first, last), index=piece.index)
            yield block


def _pwrite(file: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _commit(plan: Plan, target: Path) -> None:
    entries = _entries(plan.items)
    empty = Stored(_file_name(0), plan.sizes[0], plan.empty.total)
    save_id = hashlib.sha256(repr([(i.cell, i.mapped.shape, i.dtype) for i in plan.items]).encode()).hexdigest()[:36]
    # both flags say how megatron-core laid the state out: without optimizer state only its own defaults matter
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {
        "singleton_local_shards": False, "chained_optim_avoid_prefix": True}}  # fmt: skip
    archive = Archive(dump(common), 0)
    with replacing(target / "common.pt") as file:
        file.write(archive.prefix(0) + archive.suffix(0))
    with replacing(target / "metadata.json") as file:
        file.write(json.dumps(_FORMAT).encode())
    with replacing(target / ".metadata") as file:
        file.write(dump_metadata(entries, ((key, empty) for key in plan.states), save_id=save_id))


def _entries(items: Sequence[Item]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for item in items:
        shape, lead = item.mapped.shape, item.cell.lead
        entry = entries.setdefault(item.cell.key, Entry((*item.cell.axes, *shape), dtype=item.dtype))
        if entry.dtype != item.dtype:
            raise ConversionError(
                f"{item.mapped.name} {list(shape)} is {item.dtype} and other layers of {item.cell.key} are "
                f"{entry.dtype}: one dtype is needed, entry {item.mapped.entry}"
            )
        stored = Stored(_file_name(item.file), item.offset, item.archive.total)
        entry.chunks.append(Chunk((*lead, *[0] * len(shape)), (*[1] * len(lead), *shape), stored))
    return entries
