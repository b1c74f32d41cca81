"""Weights on their way to an engine: a block of bytes, and which tensors lie where in it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megabatch.errors import RolloutError


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor in a bucket, or the part of one that a bucket has room for."""

    name: str
    """Hugging Face's."""
    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Byte of the whole tensor that the part begins with."""
    offset: int
    """Byte of the bucket."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some tensors; the data is valid until the next bucket is asked for."""

    parts: tuple[Part, ...]
    data: memoryview
    checksum: int
    """CRC-32 of the data."""

    def manifest(self) -> dict[str, Any]:
        """What an engine needs besides the data, as JSON values."""
        return {"size": self.data.nbytes, "crc32": self.checksum, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def of(cls, manifest: Mapping[str, Any], data: memoryview) -> Bucket:
        """The bucket of a manifest and its bytes. Raises: RolloutError if the bytes are not those of the manifest."""
        parts = tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in manifest["parts"])
        found = zlib.crc32(data)
        if data.nbytes != manifest["size"] or found != manifest["crc32"]:
            raise RolloutError(
                f"a bucket of {len(parts)} tensors from {parts[0].name} on arrived with {data.nbytes:,} bytes and "
                f"CRC-32 {found:08x}, sent were {manifest['size']:,} and {manifest['crc32']:08x}; the update is void"
            )
        return cls(parts, data, found)
