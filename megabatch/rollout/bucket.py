"""Weights on their way to an engine: a block of bytes, and which tensors lie where in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xxhash import xxh3_64_hexdigest

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
    """Some tensors; the data is valid until the next bucket is asked for, or the next but one where servers get it."""

    parts: tuple[Part, ...]
    data: memoryview

    def manifest(self) -> dict[str, Any]:
        """What an engine needs besides the data, as JSON values, with the data's digest (XXH3, 64 bits)."""
        digest = xxh3_64_hexdigest(self.data)
        return {"size": self.data.nbytes, "xxh3": digest, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def of(cls, manifest: Mapping[str, Any], data: memoryview) -> Bucket:
        """The bucket of a manifest and its bytes. Raises: RolloutError if the bytes are not those of the manifest."""
        parts = tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in manifest["parts"])
        found = xxh3_64_hexdigest(data)
        if data.nbytes != manifest["size"] or found != manifest["xxh3"]:
            raise RolloutError(
                f"a bucket of {len(parts)} tensors from {parts[0].name} on arrived with {data.nbytes:,} bytes and "
                f"XXH3 {found}, sent were {manifest['size']:,} and {manifest['xxh3']}; the update is void"
            )
        return cls(parts, data)
