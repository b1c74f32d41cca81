"""Rows cut over context-parallel ranks: which tokens a rank has, what stays whole, and what is counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rank_server import RankServer

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.pack import Pack, collate


def row_of_two(cp: int) -> Pack:
    """Sequences of 5 and 3 tokens, with a column of each token."""
    numbers = [np.arange(first, first + count) for first, count in ((10, 5), (20, 3))]
    samples = [
        Sample(ids.astype(np.int32), np.ones(len(ids), np.float32), {"label": i}, {"old": ids.astype(np.float32)})
        for i, ids in enumerate(numbers)
    ]
    return collate(samples, row_multiple=8 * cp, sequence_multiple=2 * cp)


def parts(cp: int) -> tuple[Any, ...]:
    """Of this rank: its tokens in numbers, and what sums over sequences give, with gradients."""
    from megabatch.trainer.engine import share_of
    from megabatch.trainer.objectives.objective import Mean, Terms
    from megabatch.trainer.ranks import Ranks
    from megabatch.trainer.zigzag import zigzag

    with Ranks(context_parallel_size=cp) as ranks:
        pack = row_of_two(cp)
        cut = zigzag(pack.cu_seqlens_padded, ranks.cp)
        part = pack.part(cut)
        assert torch.equal(part.items_N, pack.items_N) and part.columns == pack.columns and part.sequences == 2
        assert torch.equal(part.cu_seqlens_padded, pack.cu_seqlens_padded)
        whole = [torch.empty_like(part.ids_T) for _ in range(cp)]
        torch.distributed.all_gather(whole, part.ids_T, group=ranks.cp)
        assert torch.equal(torch.cat(whole)[cut.places_T], pack.ids_T)
        values_T = part.token_columns["old"].clone().requires_grad_()
        sums_N = part.sequence_sums(values_T * part.weights_T)
        # a loss in which each rank's tokens weigh by a number of their whole sequence, and one of sequences alone
        of_tokens = (sums_N[part.segments_T.clamp(max=1).long()] * values_T * part.weights_T).sum()
        of_sequences = sums_N.square().sum()
        terms = Terms(of_sequences, of_sequences, {"loss": Mean(of_sequences, of_sequences)}, per="sequence")
        loss = of_tokens + share_of(terms, part).numerator
        loss.backward()
        assert values_T.grad is not None
        counted = share_of(terms, part)
        return (
            {name: getattr(part, name).tolist() for name in ("ids_T", "positions_T", "segments_T", "weights_T")},
            sums_N.tolist(),
            float(loss),
            list(zip(cut.mine_t.tolist(), values_T.grad.tolist(), strict=True)),
            [float(x) for x in (counted.weight, counted.metrics["loss"].total, counted.metrics["loss"].count)],
        )


def test_a_row_of_two_by_hand(ranks: RankServer) -> None:
    """Of 8 tokens, 4 and 4 of padding on two ranks: chunks of 2, 1 and 1."""
    first, second = (tokens for tokens, *_ in ranks.run(parts, world_size=2, cp=2))
    assert first == {
        "ids_T": [10, 11, 0, 0, 20, 0, 0, 0],
        "positions_T": [0, 1, 6, 7, 0, 3, 0, 3],
        "segments_T": [0, 0, 0, 0, 1, 1, 2, 2],
        "weights_T": [1, 1, 0, 0, 1, 0, 0, 0],
    }
    assert second == {
        "ids_T": [12, 13, 14, 0, 21, 22, 0, 0],
        "positions_T": [2, 3, 4, 5, 1, 2, 1, 2],
        "segments_T": [0, 0, 0, 0, 1, 1, 2, 2],
        "weights_T": [1, 1, 0, 0, 1, 0, 0, 0],
    }


@pytest.mark.parametrize("cp", [2, 4])
def test_the_shares_of_all_ranks_are_the_loss(cp: int, ranks: RankServer) -> None:
    """In value and gradient, whatever a rank does with a sum over whole sequences; counts are counted once."""
    pack = row_of_two(cp)
    values_T = pack.token_columns["old"].clone().requires_grad_()
    sums_N = pack.sequence_sums(values_T * pack.weights_T)
    assert sums_N.tolist() == [11 + 12 + 13 + 14, 21 + 22]
    loss = 2 * sums_N.square().sum()
    loss.backward()
    assert values_T.grad is not None
    found = ranks.run(parts, world_size=cp, cp=cp)
    assert all(sums == sums_N.tolist() for _, sums, *_ in found)
    assert sum(share for _, _, share, *_ in found) == pytest.approx(float(loss))
    grads = dict(pair for *_, pairs, _ in found for pair in pairs)
    assert [grads[place] for place in range(len(pack.ids_T))] == pytest.approx(values_T.grad.tolist())
    counted = np.array([counts for *_, counts in found])
    assert counted.sum(0).tolist() == pytest.approx([float(loss) / 2] * 3) and (counted[1:] == 0).all()


def test_sums_over_the_sequences_of_a_whole_row() -> None:
    pack = row_of_two(2)
    assert pack.sequence_sums(torch.ones_like(pack.weights_T)).tolist() == [8, 4]
    assert pack.sequence_sums(torch.ones(len(pack.ids_T), 3)).tolist() == [[8] * 3, [4] * 3]
    empty = replace(pack, sequences=0, segments_T=torch.zeros_like(pack.segments_T))
    assert empty.sequence_sums(pack.weights_T).tolist() == []
