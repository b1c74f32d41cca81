"""The lowest entropy kept equals what sorting all tokens gives."""

from __future__ import annotations

import pytest
import torch

from megabatch.rl.entropy import lowest_kept


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 5, 101])
def test_it_keeps_what_the_quantile_keeps(keep, tokens):
    generator = torch.Generator().manual_seed(tokens)
    entropies = torch.rand(tokens, generator=generator) * 3
    entropies[: tokens // 4] = entropies[0]  # ties
    found = lowest_kept(entropies, torch.ones(tokens), keep=keep, total=lambda values: values)
    assert found in entropies
    quantile = torch.quantile(entropies.double(), 1 - keep)
    assert torch.equal(entropies >= found, entropies.double() >= quantile - 1e-9)


def test_tokens_of_all_ranks_count_and_masked_ones_do_not():
    entropies, mask = torch.tensor([0.0, 3.0, 1.0, 9.0]), torch.tensor([1, 1, 1, 0])
    both = lowest_kept(entropies, mask, keep=0.5, total=lambda values: values * 2)
    assert both == 1.0
    assert lowest_kept(entropies, mask * 0, keep=0.5, total=lambda values: values) == 0
