"""Puts the parts of buckets where they belong in a model's tensors, without another copy of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megabatch.converters.dtypes import TORCH
from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket, Part


class Filling:
    """One update of a model's tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Args: tensors: contiguous, by Hugging Face's name."""
        self._tensors = tensors
        self._left = {name: tensor.nbytes for name, tensor in tensors.items()}
        """Bytes that have not come yet."""

    def put(self, bucket: Bucket) -> None:
        """Raises: RolloutError for a tensor that the model lacks or has in another form."""
        for part, bytes_of_tensor, data in _parts(self._tensors, bucket):
            bytes_of_tensor[part.start : part.start + part.size].copy_(data)
            self._left[part.name] -= part.size

    def end(self) -> None:
        """Raises: RolloutError naming tensors that did not come whole, or came twice."""
        if wrong := sorted(name for name, left in self._left.items() if left):
            raise RolloutError(
                f"{len(wrong)} of {len(self._left)} tensors did not come exactly once, for example {wrong[0]} "
                f"({self._left[wrong[0]]:,} of {self._tensors[wrong[0]].nbytes:,} bytes left); the update is void"
            )


def differing(tensors: Mapping[str, Tensor], bucket: Bucket) -> list[str]:
    """Names of the tensors of which the bucket has other bytes."""
    found = [part.name for part, mine, data in _parts(tensors, bucket) if not _equal(part, mine, data)]
    return list(dict.fromkeys(found))


def _equal(part: Part, mine: Tensor, data: Tensor) -> bool:
    return torch.equal(mine[part.start : part.start + part.size].cpu(), data)


def _parts(tensors: Mapping[str, Tensor], bucket: Bucket) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """(part, the whole tensor's bytes, the part's new bytes)."""
    data = torch.frombuffer(bucket.data, dtype=torch.uint8)
    for part in bucket.parts:
        tensor = tensors.get(part.name)
        if tensor is None:
            raise RolloutError(
                f"{part.name} {part.dtype} {list(part.shape)} came, which the engine's model does not have; its first "
                f"tensors are {', '.join(list(tensors)[:3])}"
            )
        dtype = f"torch.{TORCH.get(part.dtype, part.dtype)}"
        if (dtype, part.shape) != (str(tensor.dtype), tuple(tensor.shape)):
            raise RolloutError(
                f"{part.name} came as {dtype} {list(part.shape)}, the engine has {tensor.dtype} {list(tensor.shape)}"
            )
        yield part, tensor.view(-1).view(torch.uint8), data[part.offset : part.offset + part.size]
