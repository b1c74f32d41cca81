"""The buckets of one update on their way to the workers of a server.

A bucket is three broadcasts: the sizes of what follows, its manifest, its data. Sizes of zero end the update. So a
server is asked once for an update, and takes the next bucket while it loads the last.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megabatch.rollout.bucket import Bucket
from megabatch.rollout.vllm.group import Group


def send(group: Group, bucket: Bucket) -> None:
    """Returns when the bucket's memory may change. Raises: RuntimeError when a worker is gone."""
    manifest = bytearray(json.dumps(bucket.manifest()).encode())
    _send_sizes(group, len(manifest), bucket.data.nbytes)
    group.tell(torch.frombuffer(manifest, dtype=torch.uint8))
    group.broadcast(torch.frombuffer(bucket.data, dtype=torch.uint8))


def send_end(group: Group) -> None:
    _send_sizes(group, 0, 0)


def _send_sizes(group: Group, manifest: int, data: int) -> None:
    group.tell(torch.tensor([manifest, data]))


class Buffers:
    """Memory for what arrives, used again once no tensor looks at it any more."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 values; they stay as they are while the array, or a tensor that shares its memory, exists."""
        whole = self._free.pop() if self._free else np.empty(size, np.uint8)
        if whole.nbytes < size:
            whole = np.empty(size, np.uint8)
        lease = whole[:size]
        weakref.finalize(lease, self._free.append, whole)
        return lease


def arriving(group: Group, buffers: Buffers) -> Generator[Bucket, None, None]:
    """The buckets of an update, each received while the one before it is used.

    Raises: RuntimeError when the trainer is gone; RolloutError for a bucket that arrives damaged.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_received, group, buffers)
        while (bucket := coming.result()) is not None:
            coming = thread.submit(_received, group, buffers)
            yield bucket


def _received(group: Group, buffers: Buffers) -> Bucket | None:
    """None at the end."""
    sizes = torch.empty(2, dtype=torch.int64)
    group.tell(sizes)
    if not sizes.any():
        return None
    manifest: np.ndarray = np.empty(int(sizes[0]), np.uint8)
    data = buffers.take(int(sizes[1]))
    group.tell(torch.from_numpy(manifest))
    group.broadcast(torch.from_numpy(data))
    return Bucket.of(json.loads(manifest.tobytes()), data.data)
