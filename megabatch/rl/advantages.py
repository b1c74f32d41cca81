"""Rewards → advantages: what each completion's reward is compared with, and what the difference is divided by.

N: completions, those of a prompt side by side; G: completions of a prompt; R: rewards. A NaN reward is a missing one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megabatch.values import dataclass

Estimator = Literal["grpo", "rloo", "reinforce_plus_plus"]
Scale = Literal["group", "batch", "none", "gdpo"]

TINY = 1e-4
"""Added to every standard deviation, as TRL and Megatron-SWIFT do."""
EQUAL = 1e-12
"""Rewards that differ by less, relative to the largest of them, are equal."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """What a round's rewards amount to."""

    advantages_N: Tensor
    """Of the rewards' type; 0 for a completion without any reward, and where all of a group are equal."""
    rewards_N: Tensor
    """The weighted sum of the rewards that a completion has, without the KL term; NaN where it has none."""
    spreads_P: Tensor
    """`spreads` of `rewards_N`."""


def advantages(
    rewards_NR: Tensor,
    weights_R: Tensor,
    *,
    num_generations: int,
    estimator: Estimator = "grpo",
    scale: Scale = "group",
    kl_N: Tensor | None = None,
) -> Advantages:
    """The advantage of each completion.

        r = sum of w_k r_k over the rewards that are there, - kl
        grpo, reinforce_plus_plus   a = r - mean of its group
        rloo                        a = r - mean of the group's others = (r - mean of its group) * n / (n - 1)
        group, batch                a / (std + 1e-4), the std of r in its group or in the batch; reinforce_plus_plus
                                    takes that of a
        gdpo                        a = z / (std of z in the batch + 1e-4), z = sum of w_k (r_k - mean) / (std + 1e-4)
                                    with mean and std of its group, less the batch's mean of z

    Standard deviations are those of samples (n - 1). Completions without a reward take no part in means.

    Args: rewards_NR [N, R] fp64, so that rewards far from 0 keep their differences; weights_R [R], of the same type;
    kl_N [N]: the KL term in units of the reward (`kl_in_reward`).
    Source: GRPO arXiv:2402.03300 section 4.1.2; RLOO arXiv:2402.14740 equation 8; REINFORCE++ arXiv:2501.03262;
    GDPO arXiv:2601.05242.
    """
    known_NR = ~rewards_NR.isnan()
    rewards_N = (rewards_NR.nan_to_num(0.0) * weights_R).sum(1)
    rewards_N = rewards_N.masked_fill(~known_NR.any(1), float("nan"))
    spreads_P = spreads(rewards_N.view(-1, num_generations))
    if scale == "gdpo":
        found_N = _of_each_reward(rewards_NR, weights_R, num_generations)
    else:
        regularised_N = rewards_N if kl_N is None else rewards_N - kl_N
        found_N = _compared(regularised_N.view(-1, num_generations), estimator=estimator, scale=scale).flatten()
    return Advantages(found_N.nan_to_num(0.0), rewards_N, spreads_P)


def _compared(rewards_PG: Tensor, *, estimator: Estimator, scale: Scale) -> Tensor:
    centred_PG = rewards_PG - _mean(rewards_PG)
    if estimator == "rloo":
        known_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
        centred_PG = centred_PG * known_P1 / (known_P1 - 1).clamp(min=1)
    measured_PG = centred_PG if estimator == "reinforce_plus_plus" else rewards_PG
    if scale == "group":
        return centred_PG / (_std(measured_PG) + TINY)
    if scale == "batch":
        return centred_PG / (_std(measured_PG.reshape(1, -1)) + TINY)
    return centred_PG


def _of_each_reward(rewards_NR: Tensor, weights_R: Tensor, num_generations: int) -> Tensor:
    """GDPO: each reward is normalised in its group, so that none drowns in another's scale."""
    total_N = rewards_NR.new_zeros(len(rewards_NR))
    for rewards_N, weight in zip(rewards_NR.unbind(1), weights_R, strict=True):
        rewards_PG = rewards_N.view(-1, num_generations)
        normal_PG = (rewards_PG - _mean(rewards_PG)) / (_std(rewards_PG) + TINY)
        total_N = total_N + weight * normal_PG.flatten().nan_to_num(0.0)
    total_N = total_N.masked_fill(rewards_NR.isnan().all(1), float("nan"))
    return (total_N - _mean(total_N[None])[0]) / (_std(total_N[None])[0] + TINY)


def spreads(values_PG: Tensor) -> Tensor:
    """[P]: each row's standard deviation over the values that are there; 0 where fewer than two are, or all are equal
    but for rounding (sums of the same rewards in another order)."""
    lowest_P1, highest_P1 = _bounds(values_PG)
    is_equal_P1 = highest_P1 - lowest_P1 <= EQUAL * torch.maximum(highest_P1.abs(), lowest_P1.abs())
    return _std(values_PG).masked_fill(is_equal_P1, 0.0)[:, 0]


def _bounds(values_PG: Tensor) -> tuple[Tensor, Tensor]:
    """[P, 1] each: the lowest and the highest of the values that are there; inf and -inf where none is."""
    lowest_P1 = values_PG.nan_to_num(float("inf")).amin(1, keepdim=True)
    return lowest_P1, values_PG.nan_to_num(float("-inf")).amax(1, keepdim=True)


def _mean(values_PG: Tensor) -> Tensor:
    """[P, 1]: each row's mean over the values that are there, and none of them below or above all: the rounded mean of
    equal values may be another number, and a difference of it an advantage of nothing."""
    lowest_P1, highest_P1 = _bounds(values_PG)
    return torch.minimum(torch.maximum(values_PG.nanmean(1, keepdim=True), lowest_P1), highest_P1)


def _std(values_PG: Tensor) -> Tensor:
    """[P, 1]: each row's standard deviation over the values that are there; 0 where fewer than two are."""
    known_P1 = (~values_PG.isnan()).sum(1, keepdim=True)
    squares_PG = (values_PG - _mean(values_PG)).square().nan_to_num(0.0)
    return (squares_PG.sum(1, keepdim=True) / (known_P1 - 1).clamp(min=1)).sqrt()


def of_teacher(teacher_T: Tensor, old_T: Tensor) -> Tensor:
    """log p_teacher - log p_old of each token: what it is worth to a teacher. Its mean estimates -KL(old || teacher).

    Source: MiniLLM, arXiv:2306.08543 section 2.2, the reward of a single token.
    """
    return torch.sub(teacher_T, old_T)


def kl_in_reward(old_T: Tensor, reference_T: Tensor) -> Tensor:
    """log p_old - log p_ref of each token; its sum over a completion estimates KL(old || reference) (k1).

    Source: PPO for language models, arXiv:2009.01325 section 3.4; Schulman, http://joschu.net/blog/kl-approx.html.
    """
    return torch.sub(old_T, reference_T)
