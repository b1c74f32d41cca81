"""Attention over a row that is cut over context-parallel ranks, against each sequence alone in fp64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rank_server import RankServer


def attend(lengths: list[int], heads: int, groups: int, window: int | None) -> tuple[list[float], list[int]]:
    """Of this rank: largest differences of output and gradients, and how often it gathered in forward and backward."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model import keys
    from megabatch.trainer.model.attention import PackedAttention
    from megabatch.trainer.model.row import row
    from megabatch.trainer.ranks import Ranks
    from megabatch.trainer.zigzag import zigzag

    gathered, gather = [0], keys._gathered

    def counted(*arguments: Any) -> torch.Tensor:
        gathered[-1] += 1
        return gather(*arguments)

    keys._gathered = counted
    sizes: dict[str, Any] = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": 8}
    with Ranks(context_parallel_size=int(os.environ["WORLD_SIZE"])) as ranks:
        config = TransformerConfig(
            num_layers=1, hidden_size=32, attention_dropout=0.0, window_size=window and (window - 1, 0), **sizes
        )
        attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
        generator = torch.Generator().manual_seed(len(lengths))
        tensors = [torch.randn(sum(lengths), n, 8, generator=generator) for n in (heads, groups, groups)]
        weights = torch.randn(sum(lengths), heads * 8, generator=generator)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        cut = zigzag(bounds, ranks.cp)
        mine = [tensor[cut.mine_t].requires_grad_() for tensor in tensors]
        out = attention(*mine, None, packed_seq_params=row(bounds, cut=cut))
        for _ in range(2):  # gradients add up
            gathered.append(0)
            (out * weights[cut.mine_t]).sum().backward(retain_graph=True)
        exact = [tensor.double().requires_grad_() for tensor in tensors]
        reference = torch.cat([one(*part, window) for part in zip(*(x.split(lengths) for x in exact), strict=True)])
        (2 * reference * weights.double()).sum().backward()
        pairs = [(out, reference), *((m.grad, e.grad) for m, e in zip(mine, exact, strict=True))]
        return [float((a.double() - b[cut.mine_t]).abs().max()) for a, b in pairs], gathered  # type: ignore[union-attr, index]


def one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V of one sequence, each query before the keys behind it and past its window."""
    length, heads, width = query.shape
    key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
    behind = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (behind < 0) | (behind >= (window or length))
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).reshape(length, heads * width)


@pytest.mark.parametrize(
    ("heads", "groups", "window"), [(4, 4, None), (4, 2, None), (6, 1, None), (4, 2, 3), (4, 2, 9)]
)
@pytest.mark.parametrize(("cp", "lengths"), [(2, [4]), (2, [8, 4, 20, 12]), (2, [8, 8]), (4, [8, 24, 16])])
def test_each_chunk_sees_its_sequence_up_to_its_own_end(
    cp: int, lengths: list[int], heads: int, groups: int, window: int | None, ranks: RankServer
) -> None:
    settings = {"lengths": lengths, "heads": heads, "groups": groups, "window": window}
    for differences, gathered in ranks.run(attend, world_size=cp, **settings):
        assert max(differences) < 1e-5
        assert gathered == [1, 1, 1], "what other ranks have is not kept for the backward"
