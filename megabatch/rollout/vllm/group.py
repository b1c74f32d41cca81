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
        """Waits for all ranks. Args: device: weights travel by nccl for a GPU, by gloo otherwise."""
        self._store, self._rank, self._device = store, rank, device
        timeout = timedelta(seconds=timeout_s)
        self._host: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
            dist.PrefixStore("host", store), rank, size, timeout
        )
        self._group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL | None = self._host
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(dist.PrefixStore("weights", store), rank, size, timeout)

    def tell(self, flat: Tensor) -> None:
        """`broadcast` of a few values, always by gloo, which notices when a rank is gone: nccl would wait for it."""
        self._raise(_failure(self._host, flat))

    def broadcast(self, flat: Tensor) -> None:
        """Rank 0's uint8 values, in host memory, into the tensors of equal size that the others pass.

        Raises: RuntimeError when a rank is gone.
        """
        on_device = flat.to(self._device)
        self._raise(_failure(self._group, on_device))
        if self._rank and on_device is not flat:
            flat.copy_(on_device)

    def close(self) -> None:
        """Lets the other ranks know that this one is gone, once no broadcast of its own is under way."""
        self._host = self._group = None

    @staticmethod
    def _raise(failure: str | None) -> None:
        """A new error: one with a traceback into the process group would keep that alive."""
        if failure is not None:
            raise RuntimeError(failure)


def _failure(group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL | None, tensor: Tensor) -> str | None:
    if group is None:
        return "the group was closed"
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    try:
        group.broadcast([tensor], options).wait()
    except RuntimeError as e:
        return str(e)
    return None


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
