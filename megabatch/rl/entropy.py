"""Which tokens have the highest entropy, over all ranks that hold some."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

_BITS, _DIGITS = 8, 4
"""A fp32 number is four digits of eight bits; of numbers that are not negative, the digits order as the numbers do."""


def lowest_kept(entropies_T: Tensor, mask_T: Tensor, *, keep: float, total: Callable[[Tensor], Tensor]) -> Tensor:
    """0-d fp32: the lowest entropy that is kept, where the `keep` fraction of all tokens with the highest is.

    The first of the sorted entropies at or above their (1 - keep) quantile, so that comparing with it gives the same
    tokens as comparing with the quantile. Found digit by digit from counts alone, exactly; 0 without any token.

    Args: entropies_T [T] fp32, at least 0; mask_T: 1 for the tokens that count; total: sums a tensor over the ranks.
    Source: Beyond the 80/20 rule, arXiv:2506.01939 section 5.1.
    """
    digits_T = (entropies_T.float().clamp(min=0) + 0.0).contiguous().view(torch.int32)[mask_T > 0].long()
    count = float(total(digits_T.new_tensor([len(digits_T)], dtype=torch.float64)))
    rank = math.ceil((1 - keep) * (count - 1) - 1e-9)
    found = 0
    for place in reversed(range(_DIGITS)):
        counts = torch.bincount((digits_T >> (place * _BITS)) & 0xFF, minlength=256)
        up_to = list(accumulate(total(counts.double()).tolist()))
        digit = next((number for number, some in enumerate(up_to) if some > rank), 0)
        rank -= int(up_to[digit - 1]) if digit else 0
        found |= digit << (place * _BITS)
        digits_T = digits_T[(digits_T >> (place * _BITS)) == found >> (place * _BITS)]
    return torch.tensor(found, dtype=torch.int32, device=entropies_T.device).view(torch.float32)
