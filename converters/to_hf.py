"""megatron-core torch_dist, of any sharding → Hugging Face safetensors: rows gathered and written to their place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from megabatch.converters.atomic import new_folder
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import read_config
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io import ShardFile, Writer, split_shards, write_index
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.side_files import carry_over
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.keys import Cell, cell
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

_BUFFER_BYTES = 4 << 20
_OPTIMIZER = ("optimizer.", "chained_", "rerun_state_machine_state", "rng_state")

Placed = tuple[Mapped, Cell]


def to_hf(
    mcore_folder: str | os.PathLike[str],
    hf_reference: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    workers: int = 2,
) -> None:
    """Converts a checkpoint; config, tokenizer and the like come from `hf_reference`, whose weights are not read.

    The output must not exist or be empty. Optimizer state in the checkpoint is left aside.
    Raises: ConversionError; there is no output then.
    """
    target = Path(output)
    config = read_config(hf_reference)
    family = family_of(config)
    shape = family.shape(config)
    source = TorchDistFolder(mcore_folder)
    placed = locate(source, family.tensors(shape), shape)
    entries = _entries(source, placed, family.hf_tensors(shape))
    shards = split_shards(entries, max_shard_size=max_shard_size)
    try:
        with new_folder(target) as staged:
            _write(source, placed, shards, staged, workers)
            carry_over(hf_reference, staged)
    except OSError as error:
        raise ConversionError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        source.close()


def _write(
    source: TorchDistFolder, placed: Sequence[Placed], shards: Sequence[ShardFile], folder: Path, workers: int
) -> None:
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for shard in shards:
            writer = stack.enter_context(Writer(folder / shard.name, shard.entries))
            writers |= dict.fromkeys(shard.entries, writer)
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda item: _move(source, item, writers), placed):
                pass
    write_index(folder, shards)


def locate(source: TorchDistFolder, tensors: Sequence[Mapped], shape: ModelShape) -> list[Placed]:
    """Each canonical tensor's cell, after proving that the checkpoint has exactly these.

    Raises: ConversionError naming missing, left-over and mis-shaped tensors.
    """
    stacked = not any(key.startswith("decoder.layers.0.") for key in source.entries)
    placed = [(mapped, cell(mapped, shape, stacked=stacked)) for mapped in tensors]
    expected = {place.key: (*place.axes, *mapped.shape) for mapped, place in placed}
    padded = {place.key for mapped, place in placed if mapped.split == "vocab"}
    faults = [
        *_shape_faults(source, expected, padded),
        *(
            f"{key} {list(entry.size)} is left over: no entry of the table makes it"
            for key, entry in source.entries.items()
            if key not in expected and not key.startswith(_OPTIMIZER)
        ),
    ]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ConversionError(f"{source.path}: does not fit config.json\n  " + "\n  ".join(faults[:8]) + more)
    return placed


def _shape_faults(source: TorchDistFolder, expected: Mapping[str, tuple[int, ...]], padded: set[str]) -> Iterator[str]:
    for key, size in expected.items():
        entry = source.entries.get(key)
        if entry is None:
            yield f"{key} {list(size)} is missing"
        elif entry.size != size and not (
            key in padded and len(entry.size) == len(size) and entry.size[1:] == size[1:] and entry.size[0] >= size[0]
        ):
            yield f"{key} has shape {list(entry.size)}, config.json gives {list(size)}"


def _entries(
    source: TorchDistFolder, placed: Sequence[Placed], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    dtypes = {piece.hf: place.key for mapped, place in placed for piece in mapped.pieces}
    return {name: TensorInfo(source.dtype(dtypes[name]), dims) for name, dims in shapes.items()}


def _move(source: TorchDistFolder, item: Placed, writers: Mapping[str, Writer]) -> None:
    mapped, place = item
    row_bytes = elements(mapped.shape[1:]) * ITEMSIZE[source.dtype(place.key)]
    step = max(1, _BUFFER_BYTES // row_bytes)
    buffer = memoryview(bytearray(min(step, mapped.shape[0]) * row_bytes))
    position = 0
    for piece in mapped.pieces:
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            block = buffer[: count * row_bytes]
            source.read_rows(place.key, place.lead, (position + first, position + first + count), block)
            writers[piece.hf].write(piece.hf, block, row_start=piece.rows[0] + first, index=piece.index)
        position += piece.count
