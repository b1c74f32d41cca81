"""The distribution that tokens are drawn from is transformers', and draws follow it."""

from __future__ import annotations

import pytest
import torch
from reference import by_transformers

from megabatch.rollout.engine import Sampling
from megabatch.rollout.local.drawing import distribution, draw, seen_tokens

PARAMETERS: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_k": 7, "top_p": 0.6, "repetition_penalty": 1.4},
    {"temperature": 0.9, "top_p": 1e-6, "repetition_penalty": 0.7},
)
SAMPLINGS = [Sampling(max_tokens=1, stop_ids=(), **one) for one in PARAMETERS]  # type: ignore[arg-type]


def test_each_row_has_the_distribution_of_transformers() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BV = torch.randn((len(SAMPLINGS), 40), generator=generator) * 3
    texts = torch.randint(0, 40, (len(SAMPLINGS), 6), generator=generator).tolist()
    found = distribution(logits_BV, SAMPLINGS, seen_tokens(texts, SAMPLINGS, 40))
    for row, sampling in enumerate(SAMPLINGS):
        torch.testing.assert_close(found[row], by_transformers(logits_BV[row], texts[row], sampling))


def test_equal_logits_at_the_border_keep_exactly_k() -> None:
    found = distribution(torch.zeros(1, 9), [Sampling(temperature=1.0, top_k=4, max_tokens=1, stop_ids=())])
    assert found.isfinite().sum() == 4


def test_draws_follow_the_distribution() -> None:
    """Numbers on a fine grid in [0, 1) draw each token as often as its probability says."""
    probabilities = torch.tensor([0.0, 0.5, 0.125, 0.0, 0.375, 0.0])
    grid = [(n + 0.5) / 800 for n in range(800)]
    drawn = draw(probabilities.log().expand(800, -1), grid)
    assert torch.equal(torch.bincount(drawn, minlength=6) / 800, probabilities)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 3)])
def test_no_excluded_token_is_drawn_at_the_ends(uniform: float, token: int) -> None:
    logps = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]]).log()
    assert draw(logps, [uniform]).item() == token
