"""Advantages, by numbers worked out by hand and by PyTorch's own statistics."""

from __future__ import annotations

import math

import pytest
import torch

from megabatch.rl.advantages import advantages, kl_in_reward

NAN = float("nan")
ONE = torch.ones(1)


def of(rewards, **how):
    return advantages(torch.tensor(rewards, dtype=torch.float64)[:, None], ONE.double(), num_generations=4, **how)


def test_a_group_is_centred_and_divided_by_its_standard_deviation():
    """Rewards 1, 0, 0, 1: mean 1/2, deviations of 1/2, a sample's variance of 4 * (1/4) / 3 = 1/3."""
    found = of([1, 0, 0, 1, 3, 3, 3, 3])
    each = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.advantages_N.tolist() == pytest.approx([each, -each, -each, each, 0, 0, 0, 0])
    assert found.spreads_P.tolist() == pytest.approx([math.sqrt(1 / 3), 0])


def test_without_scaling_it_is_only_centred():
    assert of([1, 0, 0, 1], scale="none").advantages_N.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_the_batch_has_one_standard_deviation():
    found = of([1, 0, 0, 1, 6, 2, 2, 2], scale="batch").advantages_N
    std = torch.tensor([1, 0, 0, 1, 6, 2, 2, 2.0]).std().item() + 1e-4
    assert found.tolist() == pytest.approx([x / std for x in (0.5, -0.5, -0.5, 0.5, 3, -1, -1, -1)])


def test_leave_one_out_compares_with_the_others():
    """6 against the mean of 2, 2, 2; each 2 against the mean of 6, 2, 2."""
    found = of([6, 2, 2, 2], estimator="rloo", scale="none").advantages_N
    assert found.tolist() == pytest.approx([4, -4 / 3, -4 / 3, -4 / 3])


def test_reinforce_plus_plus_scales_by_the_spread_of_the_differences():
    found = of([1, 0, 0, 1, 6, 2, 2, 2], estimator="reinforce_plus_plus", scale="batch").advantages_N
    centred = torch.tensor([0.5, -0.5, -0.5, 0.5, 3, -1, -1, -1])
    assert found.tolist() == pytest.approx((centred / (centred.std() + 1e-4)).tolist())


def test_a_missing_reward_is_left_out():
    """The second completion has no reward at all: the others are compared with each other, it learns nothing."""
    rewards = torch.tensor([[2, 1], [NAN, NAN], [0, NAN], [NAN, 4.0]])
    found = advantages(rewards, torch.tensor([1.0, 0.5]), num_generations=4, scale="none")
    sums = found.rewards_N.tolist()
    assert sums[0] == 2.5 and math.isnan(sums[1]) and sums[2:] == [0, 2]
    assert found.advantages_N.tolist() == pytest.approx([1, 0, -1.5, 0.5])
    left_out = advantages(rewards, torch.tensor([1.0, 0.5]), num_generations=4, estimator="rloo", scale="none")
    assert left_out.advantages_N.tolist() == pytest.approx([1.5, 0, -2.25, 0.75]), "three are left: times 3/2"
    nothing = advantages(torch.full((4, 1), NAN), ONE, num_generations=4)
    assert nothing.advantages_N.tolist() == [0] * 4 and nothing.spreads_P.tolist() == [0]


def test_gdpo_normalises_each_reward_before_it_weighs_them():
    rewards = torch.tensor([[1, 10], [0, 30], [1, 20], [0, 20], [1, 0], [1, 0], [1, 0], [0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    total = torch.zeros(8, dtype=torch.float64)
    for k in range(2):
        for group in (slice(0, 4), slice(4, 8)):
            some = rewards[group, k]
            total[group] += weights[k] * (some - some.mean()) / (some.std() + 1e-4)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    found = advantages(rewards, weights, num_generations=4, scale="gdpo")
    assert found.advantages_N.tolist() == pytest.approx(expected.tolist())
    assert found.rewards_N[0] == 21


def test_kl_in_the_reward_is_taken_off_before_comparing():
    kl = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    found = of([2, 2, 2, 2], estimator="rloo", scale="none", kl_N=kl)
    assert found.advantages_N.tolist() == pytest.approx([2 / 3, -2 / 3, 2 / 3, -2 / 3])
    assert found.rewards_N.tolist() == [2, 2, 2, 2], "what is logged as reward has no KL in it"
    assert kl_in_reward(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist() == [2]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1000.1, -123456.789, 0.0])
@pytest.mark.parametrize("each", [3, 5, 7, 8, 16])
def test_equal_rewards_are_worth_nothing_however_their_mean_is_rounded(value: float, each: int) -> None:
    rewards, weights = torch.full((2 * each, 2), value, dtype=torch.float64), torch.tensor([0.3, 0.7]).double()
    for estimator in ("grpo", "rloo", "reinforce_plus_plus"):
        for scale in ("group", "batch", "none", "gdpo"):
            found = advantages(rewards, weights, num_generations=each, estimator=estimator, scale=scale)
            assert found.advantages_N.tolist() == [0] * 2 * each and found.spreads_P.tolist() == [0, 0]


def test_sums_of_the_same_rewards_in_another_order_are_equal() -> None:
    """0.1 + 0.2 and 0.3 differ in their last bit."""
    assert 0.1 + 0.2 != 0.3
    assert of([0.1 + 0.2, 0.3, 0.3, 0.3]).spreads_P.tolist() == [0]
    assert of([1e6 + 1e-3, 1e6, 1e6, 1e6]).spreads_P.tolist() == pytest.approx([5e-4], rel=1e-3)


def test_rewards_far_from_zero_keep_their_differences() -> None:
    """1e8 + 1 is 1e8 in fp32."""
    found = of([1e8 + 1, 1e8, 1e8, 1e8 + 1]).advantages_N
    each = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([each, -each, -each, each], rel=1e-6)
