"""How a model is spread over several safetensors files, named and indexed as transformers does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megabatch.converters.atomic import replacing
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.safetensors_io.folder import INDEX, SINGLE
from megabatch.converters.safetensors_io.header import entries_bytes, tensor_bytes
from megabatch.errors import ConversionError
from megabatch.values import dataclass

_UNITS = {"": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or unit == "B"
}


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file of a model."""

    name: str
    entries: dict[str, TensorInfo]


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `5GB` (10^9), `5GiB` (2^30) or a plain number.

    Raises: ConversionError naming the units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConversionError(f"max_shard_size={text!r} is not a size; write for example 5GB, 500MB or 2GiB")
    return int(float(match[1]) * units[match[2].lower()])


def split_shards(entries: Mapping[str, TensorInfo], *, max_shard_size: str | int = "5GB") -> list[ShardFile]:
    """Deals tensors to files in order, none larger than `max_shard_size` unless a single tensor is."""
    limit = parse_size(max_shard_size)
    if limit <= 0:
        raise ConversionError(f"max_shard_size={max_shard_size!r} must be at least one byte")
    parts: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in entries.items():
        size = tensor_bytes(info)
        if parts[-1] and filled + size > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = info
        filled += size
    if len(parts) == 1:
        return [ShardFile(SINGLE, parts[0])]
    count = len(parts)
    return [ShardFile(f"model-{at:05d}-of-{count:05d}.safetensors", part) for at, part in enumerate(parts, start=1)]


def write_index(folder: str | os.PathLike[str], shards: Sequence[ShardFile]) -> None:
    """Writes `model.safetensors.index.json` for several files; a single file needs none."""
    if len(shards) == 1:
        return
    with replacing(Path(folder) / INDEX) as file:
        file.write(index_json(shards))


def index_json(shards: Sequence[ShardFile]) -> bytes:
    """The text of `model.safetensors.index.json`."""
    total = sum(entries_bytes(shard.entries.values()) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return f"{json.dumps(index, indent=2)}\n".encode()
