"""The group that weights travel in: rank 0 is the trainer, the others are the workers of one server."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.errors import RolloutError


class Group:
    """A process group beside the world of either side, for broadcasts from rank 0."""

    def __init__(self, store: dist.TCPStore, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Waits for all ranks. Args: device: nccl for a GPU, gloo otherwise."""
        self._store, self._device = store, device
        prefixed, timeout = dist.PrefixStore("weights", store), timedelta(seconds=timeout_s)
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, timeout)
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)

    def broadcast(self, flat: Tensor) -> Tensor:
        """Rank 0's uint8 values, on the group's device; the others pass a tensor of equal size.

        Raises: RuntimeError when a rank is gone.
        """
        flat = flat.to(self._device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([flat], options).wait()
        return flat


def open_store(*, port: int | None = None, timeout_s: float) -> dist.TCPStore:
    """The trainer's side of the meeting, on a free port unless one is given."""
    return dist.TCPStore(
        "0.0.0.0",
        0 if port is None else port,
        None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def meet(
    store: dist.TCPStore, *, size: int, device: torch.device, timeout_s: float, failed: Callable[[], None]
) -> Group:
    """The trainer's group, once all workers came to the store.

    Args: failed: called while waiting; raises when the server gave up. Raises: RolloutError.
    """
    keys = [_key(rank) for rank in range(1, size)]
    deadline = time.monotonic() + timeout_s
    while not store.check(keys):
        failed()
        if time.monotonic() > deadline:
            raise RolloutError(f"the server's {size - 1} workers did not come to port {store.port} in {timeout_s:g} s")
        time.sleep(0.02)
    return Group(store, rank=0, size=size, device=device, timeout_s=timeout_s)


def join(address: str, port: int, *, rank: int, size: int, device: torch.device, timeout_s: float) -> Group:
    """A worker's group."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)
    store.set(_key(rank), "here")
    return Group(store, rank=rank, size=size, device=device, timeout_s=timeout_s)


def _key(rank: int) -> str:
    return f"came/{rank}"
