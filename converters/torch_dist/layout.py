"""Tensors laid out in the files of a torch_dist checkpoint, and the small files that describe them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from megabatch.converters.engine.plan import SmallFile, TargetFile, Tensor
from megabatch.converters.torch_dist.archive import Archive, tensor_record
from megabatch.converters.torch_dist.keys import Cell
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, dump_metadata
from megabatch.converters.torch_dist.pickle_codec import dump
from megabatch.errors import ConversionError

_FILE_BYTES = 8 << 30
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}  # fmt: skip


class Item(NamedTuple):
    """A tensor's place in the checkpoint."""

    cell: Cell
    shape: tuple[int, ...]
    """Of the cell."""
    tensor: Tensor
    """Its file and offset are not known yet; its frame is."""
    what: str
    """Names it in errors."""


class Checkpoint(NamedTuple):
    """The checkpoint that a plan writes."""

    files: list[TargetFile]
    tensors: list[Tensor]
    small: list[SmallFile]


def lay_out(
    items: Sequence[Item], *, prefix: str, files: int | None = None, states: Callable[[], Iterable[str]] = tuple
) -> Checkpoint:
    """Tensors one after the other, in `files` files of about equal size or one for each 8 GiB and at least two.

    Args: prefix: of the files' names. states: keys of empty `_extra_state` objects.
    Raises: ConversionError when the parts of one tensor differ in dtype.
    """
    whole = sum(item.tensor.data_bytes for item in items)
    count = files or max(2, -(-whole // _FILE_BYTES))
    sizes, file = [0] * count, 0
    placed: list[Item] = []
    for item in items:
        if sizes[file] * count >= whole and file + 1 < count:
            file += 1
        placed.append(item._replace(tensor=item.tensor._replace(file=file, offset=sizes[file])))
        sizes[file] += item.tensor.total
    entries = _entries(placed)
    # what torch.save writes for [torch.empty(0, dtype=uint8)], the state of a layer without FP8; one serves all
    state = Archive(dump([tensor_record("ByteStorage", (0,), 0)]), 0)
    empty = Stored(file_name(0), sizes[0], state.total)
    sizes[0] += state.total
    tails = [state.prefix(0) + state.suffix(0), *[b""] * (count - 1)]

    def metadata() -> bytes:
        return dump_metadata(entries, ((key, empty) for key in states()), save_id=_save_id(placed))

    return Checkpoint(
        files=[TargetFile(prefix + file_name(i), size, b"", tails[i]) for i, size in enumerate(sizes)],
        tensors=[item.tensor for item in placed],
        small=[
            SmallFile(f"{prefix}common.pt", _common),
            SmallFile(f"{prefix}metadata.json", json.dumps(_FORMAT).encode),
            SmallFile(f"{prefix}.metadata", metadata),
        ],
    )


def file_name(file: int) -> str:
    return f"__0_{file}.distcp"


def _common() -> bytes:
    """common.pt; both flags say how megatron-core laid the state out, and here only its own defaults matter."""
    archive = Archive(dump({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {
        "singleton_local_shards": False, "chained_optim_avoid_prefix": True}}), 0)  # fmt: skip
    return archive.prefix(0) + archive.suffix(0)


def _save_id(items: Sequence[Item]) -> str:
    made = hashlib.sha256()
    for item in items:
        made.update(repr((item.cell, item.tensor.shape, item.tensor.dtype)).encode())
    return made.hexdigest()[:36]


def _entries(items: Sequence[Item]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for item in items:
        shape, lead, tensor = item.shape, item.cell.lead, item.tensor
        entry = entries.setdefault(item.cell.key, Entry((*item.cell.axes, *shape), dtype=tensor.dtype))
        if entry.dtype != tensor.dtype:
            raise ConversionError(
                f"{tensor.name} {list(shape)} is {tensor.dtype} and other layers of {item.cell.key} are "
                f"{entry.dtype}: one dtype is needed, give it as --torch_dtype, {item.what}"
            )
        stored = Stored(file_name(tensor.file), tensor.offset, tensor.total)
        entry.chunks.append(Chunk((*lead, *[0] * len(shape)), (*[1] * len(lead), *shape), stored))
    return entries
