from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from rank_server import RankServer


def compare(lengths: list[int], heads: int, groups: int) -> list[float]:
    """Largest differences of output and gradients from attention over each sequence alone in fp64."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model.attention import PackedAttention
    from megabatch.trainer.model.row import row

    width = 8
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    tensors = [torch.randn(total, n, width, generator=generator, requires_grad=True) for n in (heads, groups, groups)]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = attention(*tensors, None, packed_seq_params=row(bounds))
    out_weights = torch.randn(out.shape, generator=generator)
    (out * out_weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    reference = torch.cat(
        [_one(*(t[a:b] for t in exact)) for a, b in torch.stack([bounds[:-1], bounds[1:]], 1).tolist()]
    )
    (reference * out_weights.double()).sum().backward()
    pairs = [(out, reference), *((t.grad, e.grad) for t, e in zip(tensors, exact, strict=True))]
    return [float((a.double() - b).abs().max()) for a, b in pairs]  # type: ignore[union-attr]


def _one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V under a causal mask, head by head."""
    length, heads, width = query.shape
    repeat = heads // key.shape[1]
    outputs = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head // repeat].T / width**0.5
        scores = scores.masked_fill(torch.triu(torch.ones(length, length), 1).bool(), float("-inf"))
        outputs.append(scores.softmax(1) @ value[:, head // repeat])
    return torch.stack(outputs, 1).reshape(length, heads * width)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [1, 5, 3], [2, 2, 9, 1]])
def test_sequences_of_a_row_do_not_see_each_other(
    lengths: list[int], heads: int, groups: int, ranks: RankServer
) -> None:
    (differences,) = ranks.run(compare, world_size=1, lengths=lengths, heads=heads, groups=groups)
    assert max(differences) < 1e-5


def grouped(with_groups: bool) -> tuple[bool, bool, float]:
    """Whether this torch's kernel takes groups; whether ours was given them unrepeated; how far the output is off."""
    from typing import Any

    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model import attention
    from megabatch.trainer.model.row import row

    seen = []

    def plain(query: Any, key: Any, value: Any, bounds: Any, *_: Any, scale: float, window_size: Any) -> Any:
        seen.append(key.shape[1])
        parts = zip(*(x.split(bounds.diff().tolist()) for x in (query, key, value)), strict=True)
        return torch.cat([_one(*part) for part in parts]).view(query.shape)

    def groups(*tensors: Any, enable_gqa: bool = False, **options: Any) -> Any:
        assert enable_gqa
        return plain(*tensors, **options)

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
    config = TransformerConfig(num_layers=1, attention_dropout=0.0, **sizes)
    ours = attention.PackedAttention(config, 1, AttnMaskType.causal, "self")
    known = attention.takes_groups(ours.flash)
    ours.flash = groups if with_groups else plain
    ours.flash_takes_groups = attention.takes_groups(ours.flash)
    tensors = [torch.randn(9, n, 8) for n in (4, 2, 2)]
    packed = row(torch.tensor([0, 4, 9], dtype=torch.int32))
    out = ours._varlen(*tensors, packed).flatten(1)
    return known, seen == [2], float((out - ours(*tensors, None, packed_seq_params=packed)).abs().max())


@pytest.mark.parametrize("with_groups", [True, False])
def test_a_kernel_that_takes_groups_gets_them(with_groups: bool, ranks: RankServer) -> None:
    ((known, unrepeated, difference),) = ranks.run(grouped, world_size=1, with_groups=with_groups)
    assert known == (version("torch") >= "2.13")
    assert unrepeated == with_groups and difference < 1e-5
