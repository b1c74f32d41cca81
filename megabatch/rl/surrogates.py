"""GRPO's losses of a token or a completion, before any average.

T: tokens of a flat row, N: its completions, P: its prompts. All tensors are fp32, or fp64 in references.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megabatch.rl.sequences import Sequences

Level = Literal["token", "sequence", "sequence_token"]


def log_importance(
    logps_T: Tensor, log_ratio_T: Tensor, mask_T: Tensor, sequences: Sequences, *, level: Level
) -> Tensor:
    """[T]: the logarithm of the ratio that a loss weighs a token with.

        token            log p_t - log p_old,t
        sequence         its mean over the sequence
        sequence_token   the mean without gradient, plus log p_t - log p_t without gradient: the same value, and the
                         gradient of the token alone

    Args: log_ratio_T: log p_t - log p_old,t, 0 outside of the mask.
    Source: GSPO, arXiv:2507.18071 equations 6 and 14.
    """
    if level == "token":
        return log_ratio_T
    mean_T = sequences.spread(sequences.means(log_ratio_T, mask_T))
    return mean_T if level == "sequence" else mean_T.detach() + logps_T - logps_T.detach()


def largest_log(dtype: torch.dtype) -> float:
    """Logarithm of the largest ratio that a number format holds: 88.72 in fp32."""
    return math.log(torch.finfo(dtype).max) - 1e-5  # less than that, whatever exp rounds to


def ratio_of(log_T: Tensor) -> Tensor:
    """exp, at most the format's largest number: an advantage or a gradient of 0 stays 0 where exp overflows."""
    return log_T.clamp(max=largest_log(log_T.dtype)).exp()


def weighed(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """The product, 0 where the weight is 0, also of an infinite value."""
    return torch.where(weights_T == 0, 0.0, values_T * weights_T)


def clipped(
    ratio_T: Tensor, advantages_T: Tensor, *, low: float, high: float, delta: float | None, log_T: Tensor | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), with rho at most `delta` where that is given.

    Args: log_T: the logarithm of rho; where it is above `largest_log`, nothing bounds a loss with a negative advantage
    but `delta`: that and its gradient are no finite numbers, so that no guard can miss them.

    Source: PPO arXiv:1707.06347 equation 7; clip-higher DAPO arXiv:2503.14476 equation 10; delta INTELLECT-2
    arXiv:2505.07291 section 3.4.
    """
    bounded_T = ratio_T if delta is None else ratio_T.clamp(max=delta)
    losses_T = -torch.minimum(bounded_T * advantages_T, ratio_T.clamp(1 - low, 1 + high) * advantages_T)
    if log_T is None or delta is not None:
        return losses_T
    is_unbounded_T = (log_T > largest_log(log_T.dtype)) & (advantages_T < 0)
    infinite_T = torch.zeros_like(losses_T).masked_fill(is_unbounded_T, float("inf"))
    return losses_T + torch.where(is_unbounded_T, log_T, 0.0) * infinite_T


def truncated(ratio_T: Tensor, logps_T: Tensor, advantages_T: Tensor, *, high: float) -> Tensor:
    """-min(rho, high) A log p, the ratio without gradient (CISPO). Source: MiniMax-M1, arXiv:2506.13585 equation 4."""
    return -ratio_T.clamp(max=high).detach() * advantages_T * logps_T


def gated(ratio_T: Tensor, advantages_T: Tensor, *, tau_pos: float, tau_neg: float) -> Tensor:
    """-sigmoid(tau (rho - 1)) 4 / tau A, with the temperature of the advantage's sign (SAPO).

    Source: SAPO, arXiv:2511.20347 equations 5 and 6.
    """
    tau_T = torch.full_like(advantages_T, tau_neg).masked_fill(advantages_T > 0, tau_pos)
    return -torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T * advantages_T


def discounted_future(values_T: Tensor, segments_T: Tensor, *, decay: float) -> Tensor:
    """[T]: the sum over the rest of the sequence of decay^k v_{t+k}, k from 0; the row must be whole.

    Doubles the distance covered each round, log2 T rounds in all: a token then adds what the one that far behind has
    found, if it belongs to the same sequence.
    """
    found_T, distance = values_T, 1
    while distance < len(values_T):
        same_T = (segments_T[distance:] == segments_T[:-distance]).to(values_T.dtype)
        more_T = found_T[distance:] * same_T * decay**distance
        found_T = torch.cat([found_T[:-distance] + more_T, found_T[-distance:]])
        distance *= 2
    return found_T


def future_influence(
    log_ratio_T: Tensor,
    ratio_T: Tensor,
    advantages_T: Tensor,
    future_of: Callable[[Tensor], Tensor],
    *,
    clip_range: float,
    high_only: bool,
    safety_threshold: float,
    delta: float | None,
) -> Tensor:
    """[T] without gradient: FIPO's weight of each token's loss.

    exp of the discounted sum of log p - log p_old over the token and the rest of its completion, clipped to
    [1 - c, 1 + c], or to [1, 1 + c] with `high_only`; within [0.8, 1] for a negative advantage whose ratio is above
    `safety_threshold`. Tokens with a ratio above `delta` count 0 in the sums.

    Args: log_ratio_T: 0 outside of completions; future_of: `discounted_future` of a row's values.
    Source: FIPO, arXiv:2603.19835; bounds and thresholds as in https://github.com/modelscope/ms-swift.
    """
    log_ratio_T, ratio_T = log_ratio_T.detach(), ratio_T.detach()
    if delta is not None:
        log_ratio_T = log_ratio_T * (ratio_T <= delta)
    weight_T = ratio_of(future_of(log_ratio_T))
    if clip_range:
        weight_T = weight_T.clamp(1.0 if high_only else 1 - clip_range, 1 + clip_range)
    is_unsafe_T = (advantages_T < 0) & (ratio_T > safety_threshold)
    return torch.where(is_unsafe_T, weight_T.clamp(0.8, 1.0), weight_T)


def classified(
    scores_N: Tensor, is_good_N: Tensor, is_there_N: Tensor, prompts_N: Tensor, *, prompts: int, tau: float
) -> Tensor:
    """[P]: log(1 + sum over bad of e^{s/tau}) + log(1 + sum over good of e^{-s/tau}) (REAL).

    0 for a prompt whose completions are all good or all bad.

    Args: scores_N: each completion's mean of log p - log p_old; is_there_N: those that take part.
    Source: Rewards as Labels, arXiv:2602.05630.
    """
    good_N, bad_N = is_good_N & is_there_N, ~is_good_N & is_there_N
    good = scores_N.new_zeros(prompts).index_add(0, prompts_N, good_N.to(scores_N.dtype)) > 0
    bad = scores_N.new_zeros(prompts).index_add(0, prompts_N, bad_N.to(scores_N.dtype)) > 0
    loss_P = _log_one_plus(scores_N / tau, bad_N, prompts_N, prompts)
    loss_P = loss_P + _log_one_plus(-scores_N / tau, good_N, prompts_N, prompts)
    return loss_P * (good & bad)


def _log_one_plus(values_N: Tensor, which_N: Tensor, prompts_N: Tensor, prompts: int) -> Tensor:
    """[P]: log(1 + sum of e^v over a prompt's chosen completions), without overflow."""
    chosen_N = values_N.detach().masked_fill(~which_N, 0.0)
    most_P = values_N.new_zeros(prompts).scatter_reduce(0, prompts_N, chosen_N, "amax")
    powers_N = (values_N - most_P[prompts_N]).masked_fill(~which_N, float("-inf")).exp()
    return most_P + (-most_P).exp().index_add(0, prompts_N, powers_N).log()


def k3(logps_T: Tensor, reference_T: Tensor, mask_T: Tensor) -> Tensor:
    """e^d - d - 1 with d = log p_ref - log p: estimates KL(p || reference); 0 where the mask is 0.

    d stays within +-20 and the estimate below 10, so that one token cannot outweigh a step.
    Source: Schulman, http://joschu.net/blog/kl-approx.html; GRPO arXiv:2402.03300 equation 4.
    """
    d_T = torch.where(mask_T > 0, reference_T - logps_T, 0.0).clamp(-20, 20)
    return (d_T.exp() - d_T - 1).clamp(max=10)
