"""The `.metadata` of torch's distributed checkpoints: which tensors there are and which bytes hold which part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megabatch.converters.dtypes import TORCH
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
    """A tensor of the checkpoint; `dtype` is safetensors' name and is not known before an archive is opened."""

    size: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)
    dtype: str = ""


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
    """What each key is; made one by one, because a large model has a hundred thousand chunks."""
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
    """Where each chunk and each object lies."""
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

    Raises: ConversionError naming `place` when it is none.
    """
    root = load(raw, place=place)
    try:
        tensors = {
            key: Entry(_ints(meta.field("size")))
            for key, meta in root.field("state_dict_metadata").items()
            if type(meta).__name__ == "TensorStorageMetadata"
        }
        shapes = {
            (key, _ints(chunk.field("offsets"))): _ints(chunk.field("sizes"))
            for key, meta in root.field("state_dict_metadata").items()
            if key in tensors
            for chunk in meta.field("chunks")
        }
        used: dict[Stored, tuple[str, tuple[int, ...]]] = {}
        for index, info in root.field("storage_data").items():
            key = index.field("fqn")
            if key in tensors:
                offsets, stored = _ints(index.field("offset")), _stored(info, place)
                if used.setdefault(stored, (key, offsets)) != (key, offsets):
                    raise ValueError(f"{key} {offsets} and {used[stored]} are in the same bytes of {stored.file}")
                tensors[key].chunks.append(Chunk(offsets, shapes[key, offsets], stored))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConversionError(f"{place}: no checkpoint metadata: {type(error).__name__} {error}") from error
    return tensors


def _ints(value: Any) -> tuple[int, ...]:
    """A torch.Size or a tuple of sizes."""
    values = tuple(value.args[0] if isinstance(value, Recorded) else value)
    if not all(isinstance(item, int) and item >= 0 for item in values):
        raise ValueError(f"{values} are no sizes")
    return values


def _stored(info: Recorded, place: str) -> Stored:
    if info.state.get("transform_descriptors"):
        raise ConversionError(f"{place}: compressed storage is not supported")
    file, offset, length = (info.field(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or "/" in file or min(offset, length) < 0:
        raise ValueError(f"{file!r} is no file of this folder")
    return Stored(file, offset, length)
