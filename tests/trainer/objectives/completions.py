"""Made completions as padded matrices and as one row; GRPO's loss written for the matrices, and computed of the row.

The reference follows the papers' formulas on [B, L] matrices in fp64 and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabatch.config.grpo import Grpo
from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.grpo import GrpoObjective
from megabatch.trainer.objectives.objective import Terms
from megabatch.trainer.pack import Pack, collate

GROUP = 4
LONGEST = 10


@dataclass(frozen=True)
class Completions:
    """B completions of up to L tokens."""

    logps: Tensor
    old: Tensor
    reference: Tensor
    entropies: Tensor
    correction: Tensor
    teacher: Tensor
    mask: Tensor
    """1 on tokens; 0 behind the end, and everywhere in completions that are left out."""
    advantages: Tensor

    def part(self, which: slice) -> Completions:
        return Completions(**{name: getattr(self, name)[which] for name in self.__dataclass_fields__})


def made(completions: int = 8, *, overlong: bool = False, seed: int = 0) -> Completions:
    generator = torch.Generator().manual_seed(seed)

    def numbers(spread: float) -> Tensor:
        return spread * torch.randn(completions, LONGEST, generator=generator, dtype=torch.float64)

    logps = -2 + numbers(0.7)
    lengths = torch.randint(1, LONGEST + 1, (completions,), generator=generator)
    mask = (torch.arange(LONGEST) < lengths[:, None]).double()
    if overlong:
        mask[::3] = 0
    return Completions(
        logps=logps,
        old=logps + numbers(0.4),
        reference=logps + numbers(0.5),
        entropies=numbers(1.0).abs(),
        correction=numbers(0.5).exp(),
        mask=mask,
        advantages=torch.randn(completions, generator=generator, dtype=torch.float64),
        teacher=logps + numbers(0.6),
    )


def as_pack(found: Completions, *, prompt: int = 3) -> tuple[Pack, Tensor]:
    """One row with a prompt before each completion, and the positions at which its tokens are predicted."""
    lengths = [int(length) for length in (found.old != 0).sum(1)]
    samples, places, start = [], [], 0
    for number, length in enumerate(lengths):
        tokens = prompt + length

        def column(values: Tensor, tokens: int = tokens, number: int = number, length: int = length) -> np.ndarray:
            out = np.zeros(tokens, np.float64)
            out[prompt:] = values[number, :length]
            return out

        samples.append(
            Sample(
                np.arange(tokens, dtype=np.int32),
                column(found.mask).astype(np.float32),
                {"advantage": float(found.advantages[number])},
                {"old": column(found.old), "reference": column(found.reference),
                 "correction": column(found.correction), "teacher": column(found.teacher),
                 "kept": column(found.entropies)},
            )
        )  # fmt: skip
        places += range(start + prompt - 1, start + tokens - 1)
        start += tokens
    pack = collate(samples, items=[number // GROUP for number in range(len(lengths))], row_multiple=16)
    # fp64 where samples have fp32
    return replace(pack, columns={"advantage": found.advantages}), torch.tensor(places)


def on_row(values: Tensor, pack: Pack, places: Tensor) -> Tensor:
    """[B, L] → [T]: nonsense wherever no token of a completion is predicted."""
    row = torch.full((len(pack.ids_T),), 7.25, dtype=values.dtype)
    return row.index_put((places,), values.flatten())


def kept_tokens(found: Completions, keep: float) -> Tensor:
    """[B, L]: the tokens at or above the (1 - keep) quantile of the entropies."""
    return (found.entropies >= torch.quantile(found.entropies[found.mask > 0], 1 - keep)).double()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def reference_loss(
    found: Completions, grpo: Grpo, *, corrected: bool = False, taught: bool = False
) -> tuple[Tensor, float]:
    """Numerator and denominator of one micro-batch."""
    mask = found.mask
    log_ratio = (found.logps - found.old) * mask
    sequence = _mean(log_ratio, mask)[:, None]
    weights = {"token": log_ratio, "sequence": sequence.expand_as(log_ratio),
               "sequence_token": sequence.detach() + found.logps - found.logps.detach()}  # fmt: skip
    ratio = weights[grpo.importance_sampling_level].exp()
    advantages = found.advantages[:, None].expand_as(ratio)
    if taught:
        advantages = advantages + grpo.teacher_kl_coef * (found.teacher - found.old)
    losses = _token_losses(ratio, log_ratio, found.logps, advantages, grpo)
    if grpo.top_entropy_quantile < 1:
        losses = losses * kept_tokens(found, grpo.top_entropy_quantile)
    d = found.reference - found.logps
    kl = d.exp() - d - 1
    if grpo.beta:
        losses = losses + grpo.beta * kl
    if corrected:
        losses = losses * found.correction
    if grpo.off_policy_sequence_mask_delta is not None:
        far = _mean(found.old - found.logps, mask) > grpo.off_policy_sequence_mask_delta
        mask = mask * ~(far & (found.advantages < 0))[:, None]
    if grpo.loss_type in ("grpo", "sapo"):
        return _mean(losses, mask).sum(), len(mask)
    if grpo.loss_type == "dr_grpo":
        return (losses * mask).sum() / LONGEST, len(mask)
    if grpo.loss_type == "real":
        return _classification(_mean(log_ratio, mask), _mean(losses, mask), mask, found, grpo), len(mask) / GROUP
    count = mask if grpo.loss_type == "bnpo" else found.mask
    return (losses * mask).sum(), float(count.sum())


def _token_losses(ratio: Tensor, log_ratio: Tensor, logps: Tensor, advantages: Tensor, grpo: Grpo) -> Tensor:
    high = grpo.epsilon_high
    assert high is not None
    if grpo.loss_type == "real":
        return ratio * 0
    if grpo.loss_type == "cispo":
        return -ratio.detach().clamp(max=high) * advantages * logps
    if grpo.loss_type == "sapo":
        tau = (advantages > 0).double() * grpo.tau_pos + (advantages <= 0).double() * grpo.tau_neg
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    bounded = ratio if grpo.delta is None else ratio.clamp(max=grpo.delta)
    losses = -torch.min(bounded * advantages, ratio.clamp(1 - grpo.epsilon, 1 + high) * advantages)
    if grpo.loss_type != "fipo":
        return losses
    weight = torch.ones_like(ratio)
    decay = 2 ** (-1 / grpo.fipo_decay_rate)
    for b in range(len(ratio)):
        for t in range(LONGEST):
            future = sum(decay ** (k - t) * log_ratio[b, k].item() for k in range(t, LONGEST)
                         if grpo.delta is None or ratio[b, k] <= grpo.delta)  # fmt: skip
            clipped = min(max(float(np.exp(future)), 1.0), 1 + grpo.fipo_clip_range)
            unsafe = advantages[b, t] < 0 and ratio[b, t] > grpo.fipo_safety_threshold
            weight[b, t] = min(max(clipped, 0.8), 1.0) if unsafe else clipped
    return losses * weight


def _classification(scores: Tensor, kl: Tensor, mask: Tensor, found: Completions, grpo: Grpo) -> Tensor:
    total = kl.sum() / GROUP
    for first in range(0, len(scores), GROUP):
        good, bad = [], []
        for b in range(first, first + GROUP):
            if mask[b].any():
                (good if found.advantages[b] > 0 else bad).append(scores[b] / grpo.real_tau)
        if good and bad:
            total = total + (1 + sum((-s).exp() for s in good)).log() + (1 + sum(s.exp() for s in bad)).log()
    return total


def settings(loss_type: str, **fields: Any) -> Grpo:
    high = 1.5 if loss_type == "cispo" else 0.28
    return Grpo(loss_type=loss_type, num_generations=GROUP, kl_in_reward=False, **{"epsilon_high": high, **fields})


def objective_of(grpo: Grpo, *, taught: bool = False) -> GrpoObjective:
    return GrpoObjective(grpo, temperature=1.0, max_completion_length=LONGEST, has_teacher=taught)


class Given:
    """Entropies in the place of a model's."""

    def __init__(self, entropies: Sequence[Tensor]) -> None:
        self.entropies = entropies

    def infer(self, packs: Sequence[Pack], readout: Any, *, model: str = "policy") -> list[Mapping[str, Tensor]]:
        assert list(readout.fields) == ["logps", "entropies"]
        return [{"entropies": one.float()} for one in self.entropies]

    def total(self, values: Tensor) -> Tensor:
        return values


def computed(
    found: Completions, grpo: Grpo, *, corrected: bool = False, taught: bool = False
) -> tuple[Tensor, Tensor, Terms]:
    """Loss and gradient [B, L] of the objective, its metrics."""
    logps = found.logps.clone().requires_grad_()
    pack, places = as_pack(found)
    names = {"old", "reference"} | ({"correction"} if corrected else set()) | ({"teacher"} if taught else set())
    columns = {name: values.to(logps.dtype) for name, values in pack.token_columns.items() if name in names}
    objective, pack = objective_of(grpo, taught=taught), replace(pack, token_columns=columns)
    entropies = on_row(found.entropies, pack, places)
    (pack,) = objective.prepare([pack], Given([entropies]))
    out = {"logps": on_row(logps, pack, places), "entropies": entropies}
    terms = objective.terms(out, pack)
    assert set(terms.metrics) == set(objective.metrics) and terms.per == "sequence"
    loss = terms.numerator / terms.weight
    return loss.detach(), torch.autograd.grad(loss, logps)[0], terms
