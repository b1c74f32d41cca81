"""Hugging Face safetensors → megatron-core torch_dist, planned: byte extents and the places they go to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.bijection import FLOATS
from megabatch.converters.dtypes import read_dtype
from megabatch.converters.engine.plan import (
    Numbered,
    Plan,
    Scales,
    SideFiles,
    SmallFile,
    Strip,
    TargetFile,
    Tensor,
    uncollected,
)
from megabatch.converters.engine.run import run
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.mapping import Mapped, Piece, elements
from megabatch.converters.quantised import PLAIN
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.side_files import replaced_config
from megabatch.converters.torch_dist.archive import Archive, archive_of, tensor_record
from megabatch.converters.torch_dist.find import RELEASE, TRACKER
from megabatch.converters.torch_dist.keys import Cell, cell, extra_states, stacks_layers
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, dump_metadata
from megabatch.converters.torch_dist.pickle_codec import dump
from megabatch.converters.weave import Weave
from megabatch.errors import ConversionError

_FILE_BYTES = 8 << 30
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}  # fmt: skip


class _Item(NamedTuple):
    """A tensor's place in the checkpoint."""

    mapped: Mapped
    cell: Cell
    tensor: Tensor


def to_mcore(
    hf_folder: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int = 2, files: int | None = None
) -> Plan:
    """Converts a folder to a bare checkpoint; the output must not exist or be empty. Returns the executed plan.

    Raises: ConversionError.
    """
    plan = plan_to_mcore(hf_folder, files=files, bare=True)
    run(plan, output, workers=workers)
    return plan


@uncollected()
def plan_to_mcore(
    hf_folder: str | os.PathLike[str],
    *,
    torch_dtype: str | None = None,
    files: int | None = None,
    bare: bool = False,
    accept_bin: bool = False,
) -> Plan:
    """Plans a folder that Megatron-LM loads: `release/` with the checkpoint, its tracker file, and the side files.

    `torch_dtype` casts every weight but those whose dtype megatron-core prescribes. `files` is the number of files of
    tensors, else one for each 8 GiB and at least two. `bare`: the checkpoint alone, not in a folder of its own.
    `accept_bin`: weights of `pytorch_model.bin` are read too, as data.
    Raises: ConversionError for whatever does not fit, before anything is written.
    """
    model = open_hf_model(hf_folder, accept_quantised=True, accept_bin=accept_bin)
    try:
        return _planned(model, Path(hf_folder), read_dtype(torch_dtype), files, bare)
    finally:
        model.folder.close()


def _planned(model: HfModel, source: Path, dtype: str | None, files: int | None, bare: bool) -> Plan:
    prefix = "" if bare else f"{RELEASE}/"
    tracker = [] if bare else [SmallFile(TRACKER, RELEASE.encode)]
    side = SideFiles(source, _config(model, source, dtype))
    numbered = Numbered()
    stacked = stacks_layers(model.shape)
    whole = _bytes(model, dtype)
    count = files or max(2, -(-whole // _FILE_BYTES))
    sizes, file = [0] * count, 0
    items = []
    for mapped in model.tensors:
        if sizes[file] * count >= whole and file + 1 < count:
            file += 1
        place = cell(mapped, model.shape, stacked=stacked)
        tensor = _tensor(model, mapped, place, numbered, dtype=dtype)._replace(file=file, offset=sizes[file])
        items.append(_Item(mapped, place, tensor))
        sizes[file] += tensor.total
    entries = _entries(items)
    # what torch.save writes for [torch.empty(0, dtype=uint8)], the state of a layer without FP8; one serves all
    state = Archive(dump([tensor_record("ByteStorage", (0,), 0)]), 0)
    empty = Stored(file_name(0), sizes[0], state.total)
    sizes[0] += state.total
    tails = [state.prefix(0) + state.suffix(0), *[b""] * (count - 1)]

    def metadata() -> bytes:
        states = extra_states(model.tensors, model.shape, stacked=stacked)
        return dump_metadata(entries, ((key, empty) for key in states), save_id=_save_id(items))

    return Plan(
        direction="to_mcore",
        source=source,
        sources=numbered.files,
        files=[TargetFile(prefix + file_name(i), size, b"", tails[i]) for i, size in enumerate(sizes)],
        tensors=[item.tensor for item in items],
        small=[
            *tracker,
            SmallFile(f"{prefix}common.pt", _common),
            SmallFile(f"{prefix}metadata.json", json.dumps(_FORMAT).encode),
            SmallFile(f"{prefix}.metadata", metadata),
        ],
        side=None if bare else side,
        ignored=model.ignored
        | dict.fromkeys(model.carried, "megatron-core has no such part; it goes along on the way back"),
    )


def _config(model: HfModel, source: Path, dtype: str | None) -> dict[str, bytes]:
    """config.json for the weights as they will be, where the source's own would be wrong."""
    if model.quantised is None:
        return replaced_config(source, dtype=dtype)
    return replaced_config(source, dtype=dtype or PLAIN, changes={"quantization_config": None})


def file_name(file: int) -> str:
    return f"__0_{file}.distcp"


def _bytes(model: HfModel, dtype: str | None) -> int:
    return sum(elements(mapped.shape) * ITEMSIZE[_dtypes(model, mapped, dtype)[1]] for mapped in model.tensors)


def _dtypes(model: HfModel, mapped: Mapped, dtype: str | None) -> tuple[str, str]:
    """What is read and what is written."""
    read = model.folder.info(next(mapped.pieces).hf).dtype
    return read, mapped.dtype or dtype or (read if model.quantised is None or read in FLOATS else PLAIN)


def _tensor(model: HfModel, mapped: Mapped, place: Cell, numbered: Numbered, *, dtype: str | None) -> Tensor:
    """A tensor that lies nowhere yet."""
    read, written = _dtypes(model, mapped, dtype)
    columns = elements(mapped.shape[1:])
    shape = (1,) * len(place.lead) + mapped.shape
    return Tensor(
        name=mapped.name if mapped.expert is None else f"{mapped.name}[{mapped.expert}]",
        file=0,
        offset=0,
        shape=shape,
        dtype=written,
        source_dtype=read,
        rows=mapped.shape[0],
        row_bytes=columns * ITEMSIZE[written],
        source_row_bytes=columns * ITEMSIZE[read],
        strips=tuple(_strips(model, mapped, columns * ITEMSIZE[read], numbered)),
        add=mapped.offset,
        arrangement=Weave(mapped, False) if mapped.woven else None,
        frame=archive_of(written, shape),
    )


def _strips(model: HfModel, mapped: Mapped, row_bytes: int, numbered: Numbered) -> Iterator[Strip]:
    """The pieces one below the other; neighbours in the source are one strip."""
    position, last = 0, None
    if mapped.woven:
        yield _whole(model, mapped, row_bytes, numbered)
        return
    for piece in mapped.pieces:
        path, start, _ = model.folder.extent(piece.hf)
        first = piece.rows[0] + _rows_before(model, piece)
        offset, source = start + first * row_bytes, numbered.number(path)
        strip = Strip(position, piece.count, source, offset, 0, row_bytes, _scales(model, piece, first, numbered))
        position += piece.count
        if last is not None and last.scales is None and strip.scales is None and _follows(last, strip):
            last = last._replace(rows=last.rows + strip.rows)
            continue
        if last is not None:
            yield last
        last = strip
    if last is not None:
        yield last


def _whole(model: HfModel, mapped: Mapped, row_bytes: int, numbered: Numbered) -> Strip:
    """All of the one tensor, or of the one leading index of it, that a woven tensor is made of."""
    piece = next(mapped.pieces)
    path, start, _ = model.folder.extent(piece.hf)
    if model.quantised is not None and model.folder.info(piece.hf).dtype not in FLOATS:
        raise ConversionError(f"{piece.hf} is quantised and woven; this is not supported, entry {mapped.entry}")
    size = mapped.shape[0] * row_bytes
    return Strip(0, mapped.shape[0], numbered.number(path), start + (piece.index or 0) * size, 0, row_bytes)


def _follows(last: Strip, strip: Strip) -> bool:
    return strip.source == last.source and strip.offset == last.offset + last.rows * last.width


def _rows_before(model: HfModel, piece: Piece) -> int:
    """Rows before a piece's leading index, in a tensor that holds all experts."""
    return 0 if piece.index is None else piece.index * model.folder.info(piece.hf).shape[1]


def _scales(model: HfModel, piece: Piece, first: int, numbered: Numbered) -> Scales | None:
    info = model.folder.info(piece.hf)
    if model.quantised is None or info.dtype in FLOATS:
        return None
    name = model.quantised.scales_of(piece.hf)
    path, offset, _ = model.folder.extent(name)
    dtype, shape = model.folder.info(name)
    if piece.index is not None:
        offset += piece.index * elements(shape[1:]) * ITEMSIZE[dtype]
        first -= _rows_before(model, piece)
    return Scales(numbered.number(path), offset, dtype, shape[-1], first, model.quantised.block)


def _common() -> bytes:
    """common.pt; both flags say how megatron-core laid the state out, and here only its own defaults matter."""
    archive = Archive(dump({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {
        "singleton_local_shards": False, "chained_optim_avoid_prefix": True}}), 0)  # fmt: skip
    return archive.prefix(0) + archive.suffix(0)


def _save_id(items: Sequence[_Item]) -> str:
    made = hashlib.sha256()
    for item in items:
        made.update(repr((item.cell, item.tensor.shape, item.tensor.dtype)).encode())
    return made.hexdigest()[:36]


def _entries(items: Sequence[_Item]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for item in items:
        shape, lead, tensor = item.mapped.shape, item.cell.lead, item.tensor
        entry = entries.setdefault(item.cell.key, Entry((*item.cell.axes, *shape), dtype=tensor.dtype))
        if entry.dtype != tensor.dtype:
            raise ConversionError(
                f"{item.mapped.name} {list(shape)} is {tensor.dtype} and other layers of {item.cell.key} are "
                f"{entry.dtype}: one dtype is needed, give it as --torch_dtype, entry {item.mapped.entry}"
            )
        stored = Stored(file_name(tensor.file), tensor.offset, tensor.total)
        entry.chunks.append(Chunk((*lead, *[0] * len(shape)), (*[1] * len(lead), *shape), stored))
    return entries
