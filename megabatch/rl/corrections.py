"""Corrections for completions that another distribution than the trained one made, and how far apart the two are.

T: tokens of a flat row, N: its completions. Masks are 1 on the completions' tokens and 0 elsewhere.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megabatch.rl.sequences import Sequences
from megabatch.values import dataclass

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

BOUND = 20.0
"""Logarithms of ratios are kept within it, so that squares of the ratio stay finite in fp32."""


def log_ratios(numerator_T: Tensor, denominator_T: Tensor, mask_T: Tensor) -> Tensor:
    """log p - log q of each token, within +-20; 0 where the mask is 0, whatever stands there."""
    return torch.where(mask_T > 0, numerator_T - denominator_T, 0.0).clamp(-BOUND, BOUND)


def rollout_weights(
    log_ratio_T: Tensor, mask_T: Tensor, sequences: Sequences, *, mode: Mode, threshold: float
) -> Tensor:
    """[T]: the importance weight of each token, for log_ratio = log p_old - log p_rollout.

        token_truncate      min(rho_t, c)            token_mask      rho_t if rho_t <= c else 0
        sequence_truncate   min(rho, c)              sequence_mask   rho_t if rho <= c else 0

    with rho = exp(mean over the sequence of log_ratio), the geometric mean of its tokens' ratios.
    Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl; IcePop arXiv:2510.18855 (masks).
    """
    ratio_T = log_ratio_T.exp()
    if mode == "token_truncate":
        return ratio_T.clamp(max=threshold)
    if mode == "token_mask":
        return ratio_T * (ratio_T <= threshold)
    whole_N = sequences.means(log_ratio_T, mask_T).exp()
    if mode == "sequence_truncate":
        return sequences.spread(whole_N.clamp(max=threshold))
    return ratio_T * sequences.spread((whole_N <= threshold).to(ratio_T.dtype))


def is_corrected(log_ratio_T: Tensor, mask_T: Tensor, sequences: Sequences, *, mode: Mode, threshold: float) -> Tensor:
    """[T] bool: the tokens whose ratio, or whose sequence's, is above the threshold."""
    if mode.startswith("token"):
        return log_ratio_T.exp() > threshold
    return sequences.spread(sequences.means(log_ratio_T, mask_T)).exp() > threshold


def is_too_far(
    logps_T: Tensor, old_T: Tensor, mask_T: Tensor, advantages_N: Tensor, sequences: Sequences, *, delta: float
) -> Tensor:
    """[N] bool: completions with a negative advantage whose mean of log p_old - log p exceeds `delta`.

    Source: DeepSeek-V3.2, arXiv:2512.02556 section 3.1 (off-policy sequence masking).
    """
    return (sequences.means(log_ratios(old_T, logps_T, mask_T), mask_T) > delta) & (advantages_N < 0)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the trainer's probabilities p are from the engine's q, over some completions' tokens."""

    kl: float
    """Mean of log q - log p: estimates KL(q || p) (k1)."""
    k3: float
    """Mean of p/q - log(p/q) - 1: estimates the same without negative values."""
    chi2_token: float
    """Mean of (p/q)² - 1: the tokens' chi-squared divergence."""
    chi2_sequence: float
    """The same of the sequences' geometric means."""
    largest: float
    """Largest |log p - log q|."""


def difference(log_ratio_T: Tensor, mask_T: Tensor, sequences: Sequences) -> Difference:
    """Of log_ratio = log p - log q. Source: Schulman, http://joschu.net/blog/kl-approx.html (k1, k3)."""
    count = mask_T.sum().clamp(min=1)
    ratio_T = log_ratio_T.exp()
    whole_N = sequences.means(log_ratio_T, mask_T).exp()
    return Difference(
        kl=float(-(log_ratio_T * mask_T).sum() / count),
        k3=float(((ratio_T - log_ratio_T - 1) * mask_T).sum() / count),
        chi2_token=float((ratio_T.square() * mask_T).sum() / count - 1),
        chi2_sequence=float(whole_N.square().mean() - 1) if sequences.count else 0.0,
        largest=float((log_ratio_T * mask_T).abs().max()) if len(mask_T) else 0.0,
    )


def effective_sample_size(weights_T: Tensor, mask_T: Tensor) -> float:
    """(sum of w)² / (n sum of w²): the fraction of the tokens that unweighted ones would be worth; 0 if all are 0.

    Source: Kong 1992, A note on importance sampling using standardized weights.
    """
    total, squares = (weights_T * mask_T).sum(), (weights_T.square() * mask_T).sum()
    return float(total.square() / (mask_T.sum() * squares).clamp(min=1e-20))
