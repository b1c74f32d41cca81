"""Errors of packed attention on CUDA against fp64, as JSON; a process of its own, which nothing has adapted to CPUs.

python attention_errors.py LENGTHS HEADS GROUPS WIDTH [EARLIER]      (LENGTHS: comma-separated)
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megabatch.trainer.model.attention import PackedAttention
from megabatch.trainer.model.row import Row, row


def errors(lengths: list[int], heads: int, groups: int, width: int, earlier: int = -1) -> dict[str, float | bool]:
    """Relative L2 errors of output and gradients, and what else must hold of the bf16 kernel."""
    attention = _attention(heads, groups, width, earlier)
    generator = torch.Generator("cuda").manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, width) for n in (heads, groups, groups)]
    tensors = [torch.randn(s, generator=generator, device="cuda").bfloat16().requires_grad_() for s in shapes]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = row(bounds, device="cuda")
    out = attention(*tensors, None, packed_seq_params=packed)
    weights = torch.randn(out.shape, generator=generator, device="cuda").bfloat16()
    (out * weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    parts = zip(*(t.split(lengths) for t in exact), strict=True)
    reference = torch.cat([_one_sequence(*part, earlier) for part in parts])
    (reference * weights.double()).sum().backward()
    changed = [t.detach().clone() for t in tensors]
    for tensor in changed:
        tensor[: lengths[0]] = 3.0
    with torch.no_grad():
        others = attention(*changed, None, packed_seq_params=packed)[lengths[0] :]
    return {
        "keeps_groups": attention.flash_takes_groups,
        "is_flash": attention.flash is not None and attention._fits_flash(tensors[0]),
        "is_isolated": torch.equal(others, out[lengths[0] :]),
        "output": _relative(out, reference),
        **{
            name: _relative(tensor.grad, truth.grad)
            for name, tensor, truth in zip(("query", "key", "value"), tensors, exact, strict=True)
        },
        "chunk": _chunk_error(attention, tensors, packed, weights),
    }


def _chunk_error(attention: PackedAttention, tensors: list[Tensor], packed: Row, weights: Tensor) -> float:
    """Largest error of output and gradients where only the second half of each sequence has queries, as the chunks of
    a row have that is cut over context-parallel ranks."""
    halves = [-(-length // 2) for length in packed.lengths]
    ends = packed.cu_seqlens_kv.tolist()[1:]
    places = torch.cat([torch.arange(end - half, end) for end, half in zip(ends, halves, strict=True)]).cuda()
    bounds = torch.tensor([0, *halves], dtype=torch.int32, device="cuda").cumsum(0).int()
    part = replace(packed, lengths=tuple(halves), cu_seqlens_q=bounds, max_seqlen_q=max(halves))
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    out = attention(query[places], key, value, None, packed_seq_params=part)
    (out * weights[places]).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    parts = zip(*(tensor.split(list(packed.lengths)) for tensor in exact), strict=True)
    reference = torch.cat([_one_sequence(*one, attention.earlier) for one in parts])[places]
    (reference * weights[places].double()).sum().backward()
    pairs = [(out, reference), *((t.grad, e.grad) for t, e in zip((query, key, value), exact, strict=True))]
    return max(_relative(found, truth) for found, truth in pairs)


def _attention(heads: int, groups: int, width: int, earlier: int) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        window_size=None if earlier < 0 else (earlier, 0),
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    return PackedAttention(config, 1, AttnMaskType.causal, "self")


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, earlier: int) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V under a causal mask, and that of a window, written out."""
    length, heads, width = query.shape
    repeat = heads // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
    positions = torch.arange(length, device=query.device)
    behind = positions[:, None] - positions
    hidden = (behind < 0) | (behind > (length if earlier < 0 else earlier))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(length, heads * width)


def _relative(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None and truth is not None
    return float((found.double() - truth).norm() / truth.norm())


if __name__ == "__main__":
    lengths_, *sizes_ = sys.argv[1:]
    print(json.dumps(errors([*map(int, lengths_.split(","))], *map(int, sizes_))))
