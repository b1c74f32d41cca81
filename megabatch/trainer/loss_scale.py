"""What fp16's losses are multiplied with, so that small gradients do not vanish: megatron-core's dynamic scaler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import Tensor


class LossScale:
    """One scaler for all of a model's megatron-core optimizers; replaces the one that each creates.

    With experts there are two optimizers. If each kept its own scaler (0.16.1), an overflow in only one of them would
    leave them at different scales. The loss is multiplied by the first one's scale, so the gradients of the other
    would be off by that ratio from then on.
    """

    def __init__(self, scaler: DynamicGradScaler) -> None:
        self._scaler = scaler
        self._overflowed = False

    @staticmethod
    def shared_by(optimizers: Sequence[Any]) -> LossScale:
        """Replaces the scalers of these megatron-core optimizers."""
        shared = LossScale(optimizers[0].grad_scaler)
        for optimizer in optimizers:
            optimizer.grad_scaler = shared
        return shared

    @property
    def scale(self) -> Tensor:
        return self._scaler.scale

    @property
    def inv_scale(self) -> Tensor:
        return self._scaler.inv_scale

    def update(self, found_inf: bool) -> None:
        """Records what one optimizer found in its gradients; the scale does not change before `end_step`."""
        self._overflowed |= found_inf

    def end_step(self) -> bool:
        """Adapts the scale to what all optimizers found. Returns: whether any gradient overflowed."""
        overflowed, self._overflowed = self._overflowed, False
        self._scaler.update(overflowed)
        return overflowed

    @property
    def is_lowest(self) -> bool:
        return bool(self.scale <= self._scaler.min_scale)

    def state(self) -> dict[str, float]:
        """Everything that determines the next scales, as JSON."""
        found = self._scaler.state_dict()
        return {name: float(value) if name == "scale" else value for name, value in found.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        scale = torch.tensor([state["scale"]], dtype=torch.float32, device=self.scale.device)
        self._scaler.load_state_dict({**state, "scale": scale})
