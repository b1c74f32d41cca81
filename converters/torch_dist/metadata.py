"""The `.metadata` of torch's distributed checkpoints: which tensors there are and which bytes hold which part."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megabatch.converters.dtypes import TORCH
from megabatch.converters.tensor_names import require_plain
from megabatch.converters.torch_dist.pickle_codec import Call, Global, Instance, Recorded, Stream, dump, load
from megabatch.errors import ConversionError

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of one item: an archive inside a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A hyper-rectangle of a tensor and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Stored


@dataclass(slots=True)
class Entry:
    """A tensor of the checkpoint."""

    size: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)
    dtype: str = ""
    """safetensors' name; empty where it is not known before an archive is opened."""


def _meta(name: str, **state: Any) -> Instance:
    return Instance(Global(_MODULE, name), state)


def _size(values: Sequence[int]) -> Call:
    return Call(Global("torch", "Size"), (tuple(values),))


def _properties(dtype: str) -> Instance:
    """dtype, layout, requires_grad, memory format and pinning, as torch's own `__getstate__` gives them."""
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    state = (Global("torch", TORCH[dtype]), layout, False, memory_format, False)
    return Instance(Global(_MODULE, "TensorProperties"), state)


def dump_metadata(tensors: Mapping[str, Entry], objects: Iterable[tuple[str, Stored]], *, save_id: str) -> bytes:
    """The pickle for these tensors and byte objects."""
    kept = list(objects)
    saved = _meta("StorageMeta", checkpoint_id=None, save_id=save_id, load_id=None, modules=[])
    return dump(
        _meta(
            "Metadata",
            state_dict_metadata=Stream(_described(tensors, kept), pairs=True),
            planner_data=None,
            storage_data=Stream(_located(tensors, kept), pairs=True),
            storage_meta=saved,
            version="1.0.0",
        )
    )


Objects = Sequence[tuple[str, Stored]]


def _described(tensors: Mapping[str, Entry], objects: Objects) -> Iterator[tuple[str, Instance]]:
    """The description of each key, generated one by one, because a large model has a hundred thousand chunks."""
    for key, entry in tensors.items():
        chunks = Stream(
            _meta("ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes))
            for chunk in entry.chunks
        )
        properties, size = _properties(entry.dtype), _size(entry.size)
        yield key, _meta("TensorStorageMetadata", properties=properties, size=size, chunks=chunks)
    for key, _ in objects:
        yield key, _meta("BytesStorageMetadata")


def _located(tensors: Mapping[str, Entry], objects: Objects) -> Iterator[tuple[Instance, Instance]]:
    """The location of each chunk and each object."""
    for key, entry in tensors.items():
        for index, chunk in enumerate(entry.chunks):
            yield _index(key, _size(chunk.offsets), index), _info(chunk.stored)
    for key, stored in objects:
        yield _index(key, None, None), _info(stored)


def _index(key: str, offset: Call | None, index: int | None) -> Instance:
    return _meta("MetadataIndex", fqn=key, offset=offset, index=index)


def _info(stored: Stored) -> Instance:
    state = {"relative_path": stored.file, "offset": stored.offset, "length": stored.length}
    return Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


def load_metadata(raw: bytes, *, place: str) -> dict[str, Entry]:
    """The tensors of a `.metadata`; byte objects are left out.

    Raises: ConversionError naming `place` for any other file, or if it describes a chunk twice or not at all.
    """
    root = load(raw, place=place)
    try:
        described = {
            key: meta
            for key, meta in root.field("state_dict_metadata").items()
            if type(meta).__name__ == "TensorStorageMetadata"
        }
        for key in described:
            require_plain(key)
        located = _places(root.field("storage_data"), described, place)
        return {key: _entry(key, meta, located.get(key, {})) for key, meta in described.items()}
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__} {error}" if not isinstance(error, ValueError) else str(error)
        raise ConversionError(f"{place}: not checkpoint metadata: {what}") from error


def _places(
    storage: Mapping[Any, Any], described: Collection[str], place: str
) -> dict[str, dict[tuple[int, ...], Stored]]:
    """Where the chunks of each tensor lie, by their first elements. Raises: ValueError for bytes of two chunks, and
    chunks in two places."""
    located: dict[str, dict[tuple[int, ...], Stored]] = {}
    used: dict[Stored, tuple[str, tuple[int, ...]]] = {}
    for index, info in storage.items():
        key = index.field("fqn")
        if key not in described:
            continue
        offsets, stored = _ints(index.field("offset")), _stored(info, place)
        if used.setdefault(stored, (key, offsets)) != (key, offsets):
            raise ValueError(f"{key} {offsets} and {used[stored]} are in the same bytes of {stored.file}")
        if offsets in located.setdefault(key, {}):
            raise ValueError(f"{key} has its chunk at {list(offsets)} in two places")
        located[key][offsets] = stored
    return located


def _entry(key: str, meta: Recorded, located: dict[tuple[int, ...], Stored]) -> Entry:
    """A tensor whose chunks are each described and located once. Raises: ValueError."""
    entry = Entry(_ints(meta.field("size")), dtype=_dtype(meta.field("properties")))
    for chunk in meta.field("chunks"):
        offsets, sizes = _ints(chunk.field("offsets")), _ints(chunk.field("sizes"))
        if offsets not in located:
            twice = any(offsets == other.offsets for other in entry.chunks)
            what = "is described twice" if twice else "is in no file"
            raise ValueError(f"{key}: the chunk at {list(offsets)} of {list(sizes)} {what}")
        entry.chunks.append(Chunk(offsets, sizes, located.pop(offsets)))
    for offsets, stored in located.items():
        raise ValueError(f"{key}: the chunk at {list(offsets)}, in {stored.file}, is not described")
    return entry


def _dtype(properties: Recorded) -> str:
    """safetensors' name of a dtype, or torch's where there is none; empty where nothing is said."""
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    name = str(getattr(dtype, "__name__", ""))
    return next((ours for ours, theirs in TORCH.items() if theirs == name), name)


_MOST = 1 << 62
"""Of bytes and sizes: what a file, and Python's calls of the system, can have."""


def _ints(value: Any) -> tuple[int, ...]:
    """A torch.Size or a tuple of sizes."""
    values = tuple(value.args[0] if isinstance(value, Recorded) else value)
    if not all(type(item) is int and 0 <= item < _MOST for item in values):
        raise ValueError(f"{str(values)[:80]} are not sizes")
    return values


def _stored(info: Recorded, place: str) -> Stored:
    if info.state.get("transform_descriptors"):
        raise ConversionError(f"{place}: compressed storage is not supported")
    file, offset, length = (info.field(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or "/" in file or "\0" in file:
        raise ValueError(f"{file!r} is not a file of this folder")
    if not all(type(number) is int and 0 <= number < _MOST for number in (offset, length)):
        raise ValueError(f"{str(length)[:40]} bytes at {str(offset)[:40]} of {file} cannot be")
    return Stored(file, offset, length)
