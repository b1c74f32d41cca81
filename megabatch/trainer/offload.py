"""Tensors that leave their device for host memory while nothing uses them.

A tensor keeps its identity: only its storage is emptied, and filled again from the copy of the host. So what shares
a storage stays together: tied weights, and the parameters that data parallelism keeps in one buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class _Stored:
    """A storage, and its bytes on the host."""

    storage: torch.UntypedStorage
    size: int
    """Bytes."""
    copy: Tensor | None = None
    """uint8 [size], in page-locked memory for a CUDA device; None as long as it is not needed."""

    def bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class Offload:
    """The storages of some tensors, which are on their device or in host memory, all of them together.

    With CUDA, both directions run on the current stream, after what was queued before and before what is queued next;
    only `to_host` waits, and only if it copies. On a CPU the class works too, and saves nothing: callers leave it out.
    """

    def __init__(
        self, tensors: Iterable[Tensor], *, values: Literal["changing", "constant", "dropped"] = "changing"
    ) -> None:
        """Args: tensors: on their device now; values: constant if they never change, so that one copy is made and
        kept, otherwise the host's memory is given back while they are on the device; dropped if nobody needs them:
        nothing is copied, and zeros come back."""
        self._values = values
        self._stored: list[_Stored] = []
        self.is_away = False
        seen = set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self._stored.append(_Stored(storage, storage.nbytes()))

    @property
    def bytes(self) -> int:
        """What the device has free while they are away."""
        return sum(one.size for one in self._stored)

    def to_host(self) -> None:
        """Frees the device's memory; the tensors must not be used until `to_device`. Does nothing a second time."""
        if self.is_away:
            return
        waits = False
        for one in self._stored if self._values != "dropped" else ():
            if one.copy is None or self._values != "constant":
                found = one.bytes()
                if one.copy is None:
                    one.copy = torch.empty(one.size, dtype=torch.uint8, pin_memory=found.is_cuda)
                one.copy.copy_(found, non_blocking=True)
                waits = waits or found.is_cuda
        if waits:
            torch.cuda.current_stream().synchronize()
        for one in self._stored:
            one.storage.resize_(0)
        self.is_away = True

    def to_device(self) -> None:
        """Gives the tensors their values back. Does nothing where they are on the device."""
        if not self.is_away:
            return
        for one in self._stored:
            one.storage.resize_(one.size)
            if one.copy is None:
                one.bytes().zero_()
            else:
                one.bytes().copy_(one.copy, non_blocking=True)
        if self._values == "changing":
            if any(one.storage.is_cuda for one in self._stored):
                torch.cuda.current_stream().synchronize()
            for one in self._stored:
                one.copy = None
        self.is_away = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside this context the tensors are on their device; outside they are where they were."""
        was_away = self.is_away
        self.to_device()
        try:
            yield
        finally:
            if was_away:
                self.to_host()


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Every parameter and buffer of these modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
