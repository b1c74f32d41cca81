"""Block-scaled FP8 by torch, one block at a time."""

from __future__ import annotations

import torch


def by_torch(values: torch.Tensor, height: int, width: int, *, powers: bool = False) -> tuple[torch.Tensor, ...]:
    """FP8 and scales of each block on its own."""
    rows, columns = values.shape
    weights = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = values[top : top + height, left : left + width].float()
            largest = part.abs().max()
            scale = torch.clamp(largest / 448.0, min=2.0**-126)
            if powers:
                scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
            scale = scale if largest > 0 else torch.ones(())
            scales[top // height, left // width] = scale
            weights[top : top + height, left : left + width] = (part / scale).to(torch.float8_e4m3fn)
    return weights, scales
