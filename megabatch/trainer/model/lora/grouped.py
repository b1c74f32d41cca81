"""The adapters of experts that are one layer (Transformer Engine's GroupedLinear): rows come sorted by expert.

T: rows of all of a rank's experts. E: experts of the rank. R, O, I: as in `adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.trainer.model.lora.adapter import Adapter

_ALIGNMENT = 8
"""Numbers of bf16 in the 16 bytes by which rows must be aligned for torch's grouped product."""


class Grouped(nn.ModuleList):
    """One adapter for each expert of a layer, in their order."""

    def forward(self, x_TI: Tensor, out_TO: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns: `out` plus each expert's term on its rows. Args: rows: how many each expert has, E ints."""
        if self._fits_kernel(x_TI, out_TO):
            return self._in_one_product(x_TI, out_TO, rows)
        parts = zip(self, x_TI.split([*rows]), out_TO.split([*rows]), strict=True)
        return torch.cat([adapter(x, out) for adapter, x, out in parts])

    def _fits_kernel(self, x_TI: Tensor, out_TO: Tensor) -> bool:
        widths = (x_TI.shape[1], out_TO.shape[1], self._first.A.shape[0])
        aligned = not any(width % _ALIGNMENT for width in widths)
        return x_TI.is_cuda and x_TI.dtype == torch.bfloat16 and aligned and _grouped_mm is not None

    def _in_one_product(self, x_TI: Tensor, out_TO: Tensor, rows: Sequence[int]) -> Tensor:
        ends_E = torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x_TI.device, non_blocking=True)
        A_EIR = torch.stack([adapter.A for adapter in self._adapters]).transpose(1, 2)
        B_ERO = torch.stack([adapter.wide_b() for adapter in self._adapters]).transpose(1, 2)
        z_TR = _grouped_mm(self._first.dropped(x_TI), A_EIR, offs=ends_E)
        return torch.add(out_TO, _grouped_mm(z_TR, B_ERO, offs=ends_E), alpha=self._first.scale)

    @property
    def _adapters(self) -> list[Adapter]:
        return [adapter for adapter in self if isinstance(adapter, Adapter)]

    @property
    def _first(self) -> Adapter:
        return self._adapters[0]


_grouped_mm: Any = getattr(functional, "grouped_mm", None)
"""torch's, which it has since 2.10."""
