"""Losses of tokens and completions, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megabatch.rl import surrogates
from megabatch.rl.sequences import Sequences

SEQUENCES = Sequences.on_one_rank(torch.tensor([0, 0, 0, 1, 1]), 2)
MASK = torch.tensor([0, 1, 1, 0, 1.0])


def test_importance_of_tokens_and_sequences():
    logps = torch.tensor([0, -1, -2, 0, -3.0], requires_grad=True)
    ratios = torch.tensor([0, 0.2, 0.4, 0, 1.0])
    for level, expected, gradient in (
        ("token", [0.2, 0.4, 1.0], [0, 1, 1, 0, 1]),
        ("sequence", [0.3, 0.3, 1.0], [0, 1, 1, 0, 1]),
        ("sequence_token", [0.3, 0.3, 1.0], [0, 1, 1, 0, 1]),
    ):
        logps.grad = None
        log_ratio = (logps - logps.detach()) * MASK + ratios
        found = surrogates.log_importance(logps, log_ratio, MASK, SEQUENCES, level=level)[MASK > 0]
        assert found.tolist() == pytest.approx(expected), level
        found.sum().backward()
        assert logps.grad.tolist() == pytest.approx(gradient), level


def test_a_sequences_ratio_shares_its_gradient_among_its_tokens():
    logps = torch.zeros(5, requires_grad=True)
    found = surrogates.log_importance(logps, logps * MASK, MASK, SEQUENCES, level="sequence")
    found[1].backward()
    assert logps.grad.tolist() == [0, 0.5, 0.5, 0, 0]


def test_clipping():
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 9.0])
    advantage = torch.tensor([1.0, 1, -1, -1, -1])
    found = surrogates.clipped(ratio, advantage, low=0.2, high=0.3, delta=None)
    assert found.tolist() == pytest.approx([-0.5, -1.3, 0.8, 1.5, 9])
    found = surrogates.clipped(ratio, advantage, low=0.2, high=0.3, delta=4.0)
    assert found.tolist() == pytest.approx([-0.5, -1.3, 0.8, 1.5, 4])


def test_a_truncated_ratio_has_no_gradient():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    ratio = (logps * 0).exp() * torch.tensor([2.0, 8.0])
    surrogates.truncated(ratio, logps, torch.tensor([1.0, -1.0]), high=5.0).sum().backward()
    assert logps.grad.tolist() == [-2, 5]


def test_a_gate_is_steepest_at_ratio_one():
    """sigmoid(0) * 4 / tau = 2 / tau, and its slope there is 1 whatever tau is."""
    ratio = torch.ones(2, requires_grad=True)
    found = surrogates.gated(ratio, torch.tensor([1.0, -1.0]), tau_pos=1.0, tau_neg=2.0)
    found.sum().backward()
    assert found.tolist() == pytest.approx([-2, 1])
    assert ratio.grad.tolist() == pytest.approx([-1, 1])


def test_the_future_is_discounted_within_its_sequence():
    values, segments = torch.tensor([1.0, 2, 4, 8, 16]), torch.tensor([0, 0, 0, 1, 1])
    found = surrogates.discounted_future(values, segments, decay=0.5)
    assert found.tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]


@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_the_future_of_long_sequences(length):
    values = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = surrogates.discounted_future(values, torch.zeros(length), decay=0.9)
    expected = [sum(0.9**k * values[t + k].item() for k in range(length - t)) for t in range(length)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def influence(log_ratio, advantages, **how):
    log_ratio = torch.tensor(log_ratio)
    options = {"clip_range": 0.2, "high_only": True, "safety_threshold": 4.0, "delta": None, **how}
    return surrogates.future_influence(
        log_ratio, log_ratio.exp(), torch.tensor(advantages), lambda values: values, **options
    ).tolist()


def test_influence_is_clipped_and_guarded():
    logs = [math.log(1.1), math.log(1.5), math.log(0.5), math.log(5)]
    assert influence(logs, [1.0, 1, 1, 1]) == pytest.approx([1.1, 1.2, 1, 1.2])
    assert influence(logs, [1.0, 1, 1, 1], high_only=False) == pytest.approx([1.1, 1.2, 0.8, 1.2])
    assert influence(logs, [1.0, 1, 1, 1], clip_range=0.0) == pytest.approx([1.1, 1.5, 0.5, 5])
    assert influence(logs, [-1.0, -1, -1, -1]) == pytest.approx([1.1, 1.2, 1, 1]), "the last is unsafe"
    assert influence(logs, [1.0, 1, 1, 1], clip_range=0.0, delta=2.0) == pytest.approx([1.1, 1.5, 0.5, 1])


def test_classification_within_a_prompt():
    """One prompt with a good and two bad completions, one whose completions are all good."""
    scores = torch.tensor([0.5, -0.25, 1.0, 2.0, 3.0], requires_grad=True)
    good, there = torch.tensor([True, False, False, True, True]), torch.tensor([True, True, True, True, True])
    prompts = torch.tensor([0, 0, 0, 1, 1])
    found = surrogates.classified(scores, good, there, prompts, prompts=2, tau=0.5)
    expected = math.log(1 + math.exp(-0.5) + math.exp(2.0)) + math.log(1 + math.exp(-1.0))
    assert found.tolist() == pytest.approx([expected, 0])
    found.sum().backward()
    odds = 1 + math.exp(-0.5) + math.exp(2.0)
    by_hand = [-2 / (1 + math.exp(1.0)), 2 * math.exp(-0.5) / odds, 2 * math.exp(2.0) / odds, 0, 0]
    assert scores.grad.tolist() == pytest.approx(by_hand)
    absent = torch.tensor([True, True, False, True, True])
    found = surrogates.classified(scores.detach(), good, absent, prompts, prompts=2, tau=0.5)
    assert found[0].item() == pytest.approx(math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-1.0)))
    large = surrogates.classified(scores.detach() * 1e4, good, there, prompts, prompts=2, tau=0.5)
    assert large[0].item() == pytest.approx(2e4), "no overflow"


def test_k3_is_zero_for_equal_models_and_bounded():
    found = surrogates.k3(
        torch.tensor([-1.0, -1, -1, -1]), torch.tensor([-1.0, -2, 50, 5]), torch.tensor([1, 1, 1, 0])
    )
    assert found.tolist() == pytest.approx([0, math.exp(-1), 10, 0])
