"""From logits to drawn tokens: each row has sampling parameters and random numbers of its own.

B: rows, V: vocabulary, P: tokens of a prompt and its completion so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megabatch.rollout.engine import Sampling


def distribution(logits_BV: Tensor, samplings: Sequence[Sampling], seen_BV: Tensor | None = None) -> Tensor:
    """Log-probabilities of the distribution that each row draws from; fp32 [B, V], -inf for excluded tokens.

    In the order of transformers and vLLM: repetition penalty (arXiv:1909.05858, section 4.1), temperature, top-k,
    top-p (arXiv:1904.09751, section 3.1). Args: seen_BV: bool, the tokens that repetition penalties apply to.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        penalty_B1 = _column([one.repetition_penalty for one in samplings], logits_BV)
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = logits_BV / _column([one.temperature for one in samplings], logits_BV)
    if any(is_cut(one) for one in samplings):
        logits_BV = logits_BV.masked_fill(_excluded(logits_BV, samplings), -torch.inf)
    return logits_BV.log_softmax(-1)


def is_cut(sampling: Sampling) -> bool:
    """Whether top-k or top-p exclude tokens."""
    return sampling.top_k > 0 or sampling.top_p < 1


def _excluded(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """bool [B, V]: the tokens that top-k, and then top-p among the rest, leave out. Of equally likely ones at the
    border those with low ids are kept."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    vocab = logits_BV.shape[-1]
    rank_V = torch.arange(vocab, device=logits_BV.device)
    k_B1 = _column([one.top_k if one.top_k > 0 else vocab for one in samplings], logits_BV)
    out_BV = rank_V >= k_B1
    p_B1 = _column([one.top_p for one in samplings], logits_BV)
    probabilities_BV = sorted_BV.masked_fill(out_BV, -torch.inf).softmax(-1)
    before_BV = _running_sums(probabilities_BV) - probabilities_BV
    out_BV = out_BV | ((before_BV >= p_B1) & (rank_V > 0) & (p_B1 < 1))
    return torch.empty_like(out_BV).scatter_(-1, order_BV, out_BV)


def draw(logps_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each row, int64 [B]: the first whose cumulative probability exceeds the row's number in [0, 1)."""
    cumulative_BV = _running_sums(logps_BV.double().exp())
    at_B1 = torch.tensor(uniforms, dtype=torch.float64, device=logps_BV.device)[:, None] * cumulative_BV[:, -1:]
    found_B1 = torch.searchsorted(cumulative_BV, at_B1, right=True)
    # rounding may put the number at the very end, behind tokens of probability 0
    last_B1 = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous())
    return torch.minimum(found_B1, last_B1)[:, 0]


def _running_sums(values_BV: Tensor) -> Tensor:
    """Cumulative sums of each row. Where torch is to be deterministic it refuses those of floats on CUDA; then they
    are added up on the host."""
    if values_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values_BV.cpu().cumsum(-1).to(values_BV.device)
    return values_BV.cumsum(-1)


def seen_tokens(rows: Sequence[Sequence[int]], samplings: Sequence[Sampling], vocab: int) -> Tensor | None:
    """bool [B, V]: the tokens of each row; None if no row has a repetition penalty."""
    if all(one.repetition_penalty == 1 for one in samplings):
        return None
    seen_BV = torch.zeros((len(rows), vocab), dtype=torch.bool)
    for row, ids in enumerate(rows):
        seen_BV[row, list(ids)] = True
    return seen_BV


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
