"""The trained model and its optimizer in host memory, while engines on the same devices generate.

Weights and optimizer state come back as they were. Gradients do not travel: a step clears them first, so their memory
is freed, and comes back zeroed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megabatch.trainer.model.build import Model
from megabatch.trainer.offload import Offload, tensors_of
from megabatch.trainer.optimizer import Optimizer

logger = logging.getLogger(__name__)


class Stowage:
    """What leaves the device with `leave`, all of it together, until `come_back`."""

    def __init__(
        self, model: Model, optimizer: Optimizer, *, device: torch.device, moves_model: bool, moves_optimizer: bool
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._moves_model, self._moves_optimizer = moves_model, moves_optimizer
        self._away: list[Offload] = []
        self._was_noted = False

    def leave(self) -> None:
        """Collective where the last step's parameters are not gathered yet. Does nothing a second time."""
        if self._away:
            return
        chunks = self._model.chunks  # with the last step's parameters, and no gather under way
        self._optimizer.zero_grad()  # main parameters keep gradients of their own
        if self._moves_model:
            self._away.append(Offload(tensors_of(chunks)))
            self._away.append(Offload(_gradients(self._model), values="dropped"))
        if self._moves_optimizer:
            self._away.append(Offload(self._of_the_optimizer(chunks)))
        for one in self._away:
            one.to_host()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # engines allocate beside torch's allocator
        if not self._was_noted:
            self._was_noted = True
            freed = sum(one.bytes for one in self._away) / 2**30
            logger.info("%.2f GiB of this rank's model and optimizer make room while engines generate", freed)

    def come_back(self) -> None:
        """Does nothing where they are on the device."""
        for one in self._away:
            one.to_device()
        self._away = []

    def _of_the_optimizer(self, chunks: list[Any]) -> Iterator[Tensor]:
        """Without those of its tensors that are parts of the model's: they stay, or have left with it."""
        model = {one.untyped_storage().data_ptr() for one in tensors_of(chunks)}
        for tensor in self._optimizer.tensors():
            if tensor.device.type == self._device.type and tensor.untyped_storage().data_ptr() not in model:
                yield tensor


def _gradients(model: Model) -> Iterator[Tensor]:
    """The buffers that gradients are parts of."""
    for chunk in model.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data
