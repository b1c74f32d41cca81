from __future__ import annotations

from importlib.metadata import version
from typing import Any

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


def _one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V under a causal mask, head by head."""
    length, heads, width = query.shape
    repeat = heads // key.shape[1]
    outputs = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head // repeat].T / width**0.5
        behind = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((behind < 0) | (behind >= (window or length)), float("-inf"))
        outputs.append(scores.softmax(1) @ value[:, head // repeat])
    return torch.stack(outputs, 1).reshape(length, heads * width)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [1, 5, 3], [2, 2, 9, 1]])
def test_sequences_of_a_row_do_not_see_each_other(
    lengths: list[int], heads: int, groups: int, ranks: RankServer
) -> None:
    (differences,) = ranks.run(compare, world_size=1, lengths=lengths, heads=heads, groups=groups)
    assert max(differences) < 1e-5


def behind_others(window: int | None) -> list[float]:
    """Of sequences that go on from another: largest differences from each whole sequence alone in fp64."""
    import numpy as np
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model.attention import PackedAttention
    from megabatch.trainer.model.row import row
    from megabatch.trainer.shared_tokens import Shared

    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
    config = TransformerConfig(
        num_layers=1, hidden_size=32, attention_dropout=0.0, window_size=window and (window - 1, 0), **sizes
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    bounds = torch.tensor([0, 3, 10, 13, 15, 16], dtype=torch.int32)
    shared = Shared(np.array([0, 3, 3, 3, 0]), np.array([0, 0, 5, 4, 0]))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(16, n, 8, generator=generator, requires_grad=True) for n in (4, 2, 2)]
    out = attention(*tensors, None, packed_seq_params=row(bounds, shared=shared))
    out_weights = torch.randn(out.shape, generator=generator)
    (out * out_weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    whole = [[*range(3)], [*range(3, 10)], [*range(3, 8), 10, 11, 12], [*range(3, 7), 13, 14], [15]]
    parts = [_one(*(t[places] for t in exact), window) for places in whole]
    own = [part[-length:] for part, length in zip(parts, bounds.diff().tolist(), strict=True)]
    reference = torch.cat(own)
    (reference * out_weights.double()).sum().backward()
    pairs = [(out, reference), *((t.grad, e.grad) for t, e in zip(tensors, exact, strict=True))]
    return [float((a.double() - b).abs().max()) for a, b in pairs]  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_go_on_from_the_tokens_that_they_share(window: int | None, ranks: RankServer) -> None:
    (differences,) = ranks.run(behind_others, world_size=1, window=window)
    assert max(differences) < 1e-5


def grouped(with_groups: bool) -> tuple[bool, bool, float]:
    """Whether this torch's kernel takes groups; whether ours was given them unrepeated; how far the output is off."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn.attention.varlen import varlen_attn

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
    assert ours.flash is None, "which is for CUDA"
    known = attention.takes_groups(varlen_attn)
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


def dropped(groups: int) -> dict[str, Any]:
    """Attention weights of a row of two sequences, read off with values that are the rows of a unit matrix."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model.attention import PackedAttention
    from megabatch.trainer.model.row import row

    heads, width, total = 4, 16, 16
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.5,
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    query, key = (torch.randn(total, n, width, generator=torch.Generator().manual_seed(n)) for n in (heads, groups))
    value = torch.eye(total)[:, None].expand(total, groups, width)
    bounds = row(torch.tensor([0, 9, 16], dtype=torch.int32))

    def weights(seed: int) -> torch.Tensor:
        model_parallel_cuda_manual_seed(seed, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        return attention(query, key, value, None, packed_seq_params=bounds).view(total, heads, width)

    first, again, other = weights(1), weights(1), weights(2)
    attention.eval()
    whole = weights(1)
    kept = first != 0
    return {
        "again": torch.equal(first, again),
        "other": torch.equal(first, other),
        "doubled": torch.allclose(first[kept], 2 * whole[kept], rtol=1e-5),
        "share": float(kept.sum() / (whole != 0).sum()),
    }


@pytest.mark.parametrize("groups", [4, 2])
def test_dropout_drops_weights_and_scales_the_rest(groups: int, ranks: RankServer) -> None:
    (found,) = ranks.run(dropped, world_size=1, groups=groups)
    assert found["again"] and not found["other"] and found["doubled"]
    assert found["share"] == pytest.approx(0.5, abs=0.1)
