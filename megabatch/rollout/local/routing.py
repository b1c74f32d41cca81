"""The experts that a model of transformers sends tokens to, while it generates (R3 of arXiv:2510.11370).

B: rows, T: tokens of a pass, L: all layers of the model, K: experts of a token.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabatch.errors import RolloutError

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Recorder:
    """Notes what each router chooses. A router is a module that returns (logits, scores, choices [B T, K])."""

    def __init__(self, model: Any) -> None:
        """Raises: RolloutError for a model without such routers."""
        routers = {name: one for name, one in model.named_modules() if type(one).__name__.endswith("TopKRouter")}
        if not routers:
            raise RolloutError(f"{type(model).__name__} has no routers that megabatch can record; take R2")
        self._layers = int(model.config.num_hidden_layers)
        self._chosen = int(next(iter(routers.values())).top_k)
        experts = int(next(iter(routers.values())).num_experts)
        self._dtype: type[np.unsignedinteger[Any] | np.signedinteger[Any]] = np.uint8 if experts <= 256 else np.int16
        self._found: dict[int, Tensor] = {}
        for name, router in routers.items():
            layer = _LAYER.search(name)
            assert layer is not None, name
            router.register_forward_hook(partial(self._note, int(layer[1])))

    def _note(self, layer: int, router: Any, given: Any, returned: Any) -> None:
        self._found[layer] = returned[2]

    def take(self, rows: int) -> np.ndarray:
        """[B, T, L, K] of the last pass, uint8, or int16 with more than 256 experts; 0 in layers without experts."""
        found, self._found = self._found, {}
        tokens = next(iter(found.values())).shape[0] // rows
        blank = torch.zeros(rows * tokens, self._chosen, dtype=torch.int64)
        all_NLK = torch.stack([found[layer].cpu() if layer in found else blank for layer in range(self._layers)], 1)
        return all_NLK.view(rows, tokens, self._layers, self._chosen).numpy().astype(self._dtype)

    def behind(self) -> np.ndarray:
        """[1, L, K]: for a token that the model was not asked to read: any experts, of which nothing follows."""
        return np.broadcast_to(np.arange(self._chosen, dtype=self._dtype), (1, self._layers, self._chosen))
