"""Which positions of a row each context-parallel rank has.

Each segment of a row is split into 2·cp equal chunks; rank r gets the r-th from the front and the r-th from the back.
So all ranks have the same number of tokens, and of query-key pairs.

T: positions of a row, t = T / cp of them on each rank. S: segments. K: keys that a rank's queries see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.shared_tokens import Shared, keys_of, positions


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's part of a row, and how to rebuild the row from the parts of all ranks."""

    group: dist.ProcessGroup
    """Ranks that split the row."""
    lengths: tuple[int, ...]
    """Tokens of each chunk of this rank, [2·S]: front and back of the first segment, of the second, …"""
    prefixes: tuple[int, ...]
    """Tokens of the segment up to the end of each chunk, those that it shares included, [2·S]: the keys that the
    chunk's queries see."""
    mine_t: Tensor
    """int64 [t]: the position in the row of each token that this rank has."""
    host_t: Tensor
    """The same in host memory."""
    places_T: Tensor
    """int64 [T]: index of each position of the row in the concatenated parts of all ranks."""
    keys_K: Tensor
    """int64 [K]: the same for the positions of all prefixes, concatenated."""

    @property
    def is_first(self) -> bool:
        """Whether this rank counts what every rank of the group knows."""
        return dist.get_rank(self.group) == 0


def zigzag(
    bounds: Tensor, group: dist.ProcessGroup, *, shared: Shared | None = None, device: torch.device | str = "cpu"
) -> Cut:
    """This rank's part of a row.

    Args: bounds: int32 [S + 1] in host memory, multiples of 2·cp: where each segment starts and the last one ends;
    shared: which tokens segments share.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    starts, segments = bounds.numpy()[:-1].astype(np.int64), np.diff(bounds.numpy())
    chunk, left = np.divmod(segments, 2 * size)
    assert not left.any(), f"segments of {segments.tolist()} tokens are no multiples of 2·{size}"
    everyone = np.concatenate([positions(*_chunks(starts, chunk, one, size)) for one in range(size)])
    places = np.empty_like(everyone)
    places[everyone] = np.arange(len(everyone))
    first, lengths = _chunks(starts, chunk, rank, size)
    prefixes, keys = keys_of(
        starts.repeat(2), first + lengths - starts.repeat(2), None if shared is None else shared.of_each_twice()
    )
    mine_t = torch.from_numpy(positions(first, lengths))
    return Cut(
        group,
        tuple(lengths.tolist()),
        tuple(prefixes.tolist()),
        on_device(mine_t, device),
        mine_t,
        *(on_device(torch.from_numpy(each), device) for each in (places, places[keys])),
    )


def _chunks(starts: np.ndarray, chunk: np.ndarray, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of a rank's chunks, [2·S] each."""
    return np.stack((starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk), 1).ravel(), chunk.repeat(2)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a host tensor through page-locked memory; otherwise the host would wait for the copy."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
