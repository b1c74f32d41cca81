"""Group relative policy optimisation: the loss of a step's completions, for every `grpo.loss_type`.

T: tokens of the row, N: its completions, P: its prompts. In this order: the surrogate of each token; tokens of low
entropy left out (`top_entropy_quantile`); plus beta times the KL term; times the rollout correction; completions that
are too far left out (`off_policy_sequence_mask_delta`). Completions that were cut off are left out beforehand
(`overlong_filter`): their weights are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.config.grpo import Grpo
from megabatch.config.resolved import resolved
from megabatch.rl.advantages import of_teacher
from megabatch.rl.corrections import is_too_far
from megabatch.rl.entropy import lowest_kept
from megabatch.rl.sequences import Sequences
from megabatch.rl.surrogates import (
    classified,
    clipped,
    discounted_future,
    future_influence,
    gated,
    k3,
    log_importance,
    ratio_of,
    truncated,
    weighed,
)
from megabatch.trainer.objectives.objective import Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.tokens import Tokens

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

ADVANTAGE = "advantage"
"""Column: the advantage of a completion."""
OLD, REFERENCE, CORRECTION, TEACHER = "old", "reference", "correction", "teacher"
"""Token columns: log-probabilities of the policy that the ratio compares with (without it, those of the policy as it
is), of the reference (without it, there is no KL term in the loss) and of a teacher, and the rollout correction
(without it, 1)."""
SAMPLED = "sampled"
"""Token column: log-probabilities that the tokens were drawn with, for `off_policy_sequence_mask_delta` where
completions are stale; without it, the old ones."""
_KEPT = "kept"

NORMS: Mapping[str, Norm] = {
    "grpo": Norm.SEQUENCES,
    "sapo": Norm.SEQUENCES,
    "dr_grpo": Norm.SEQUENCES,
    "dapo": Norm.TOKENS,
    "cispo": Norm.TOKENS,
    "fipo": Norm.TOKENS,
    "bnpo": Norm.MICRO_BATCH,
    "real": Norm.ITEMS,
}
"""What the sum of each loss is divided by. grpo and sapo sum means over completions; dr_grpo divides by the longest
possible completion too; bnpo divides by its micro-batch's tokens, real by prompts."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as the losses see it."""

    logps_T: Tensor
    mask_T: Tensor
    log_ratio_T: Tensor
    """log p - log p_old; 0 outside of completions, whatever stands there."""
    advantages_N: Tensor
    advantages_T: Tensor
    """Of each token: its completion's, and the teacher's part."""
    teacher_T: Tensor | None
    """log p_teacher - log p_old; 0 outside of completions; None without a teacher."""
    sequences: Sequences


class GrpoObjective(Objective):
    """The loss of `grpo.loss_type`. Sources: `megabatch.rl.surrogates` and `megabatch.rl.corrections`.

    grpo arXiv:2402.03300 equation 3; bnpo, the average over a micro-batch's tokens, as in TRL; dr_grpo
    arXiv:2503.20783 section 3.1; dapo arXiv:2503.14476 equation 8; the others as their surrogates.
    """

    def __init__(
        self, grpo: Grpo, *, temperature: float, max_completion_length: int, has_teacher: bool = False
    ) -> None:
        """Args: `grpo`: with derived defaults (`config.grpo_defaults`); `temperature`: of the sampled distribution;
        `has_teacher`: whether tokens have the column `TEACHER`."""
        self.norm = NORMS[grpo.loss_type]
        self._grpo, self._longest = grpo, max_completion_length
        self._selects = grpo.top_entropy_quantile < 1
        self._temperature = temperature
        self._has_kl = grpo.beta > 0 and not grpo.kl_in_reward
        self.readout = Tokens(temperature, entropies=grpo.log_entropy or self._selects)
        self.metrics: tuple[str, ...] = (
            "loss",
            "ratio",
            *(("clip_low", "clip_high") if grpo.loss_type != "real" else ()),
            *(("kl",) if self._has_kl else ()),
            *(("entropy",) if self.readout.entropies else ()),
            *(("teacher_kl",) if has_teacher else ()),
            *(("too_far",) if grpo.off_policy_sequence_mask_delta is not None else ()),
        )

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """With `top_entropy_quantile`: which tokens of the whole step the loss keeps, by the policy as it is."""
        if not self._selects:
            return packs
        found = inference.infer(packs, Tokens(self._temperature, entropies=True))
        entropies = [one["entropies"] for one in found]
        masks = [pack.weights_T.to(one.device) for pack, one in zip(packs, entropies, strict=True)]
        lowest = lowest_kept(
            torch.cat(entropies), torch.cat(masks), keep=self._grpo.top_entropy_quantile, total=inference.total
        )
        return [
            replace(pack, token_columns={**pack.token_columns, _KEPT: (one >= lowest).to(torch.float32)})
            for pack, one in zip(packs, entropies, strict=True)
        ]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """Uses `pack.weights_T`, 1 on the completions' tokens that are learned; columns as above."""
        row = self._row(out["logps"], pack)
        losses_T, found_T = self._losses(row, pack)
        if self.readout.entropies:
            found_T["entropy"] = out["entropies"]
        if (correction_T := pack.token_columns.get(CORRECTION)) is not None:
            losses_T = weighed(losses_T, correction_T)
        columns_TK = torch.stack([losses_T, *(value.to(losses_T.dtype) for value in found_T.values())], 1)
        sums_NK = row.sequences.sums(columns_TK * row.mask_T[:, None])
        counts_N = row.sequences.sums(row.mask_T)
        stays_N = self._stays(row, pack.token_columns.get(SAMPLED))
        if self.norm is Norm.ITEMS:
            total, weight = self._of_prompts(row, sums_NK[:, 0] / counts_N.clamp(min=1), stays_N, pack)
        else:
            total, weight = self._of_completions(weighed(sums_NK[:, 0], stays_N), counts_N, stays_N)
        tokens = counts_N.sum()
        metrics = {"loss": Mean(total.detach(), weight)}
        metrics |= {name: Mean(sums_NK[:, k].detach().sum(), tokens) for k, name in enumerate(found_T, 1)}
        if "too_far" in self.metrics:
            metrics["too_far"] = Mean((counts_N * (1 - stays_N)).sum(), tokens)
        return Terms(numerator=total, weight=weight, metrics=metrics, per="sequence")

    def _row(self, logps_T: Tensor, pack: Pack) -> _Row:
        mask_T = pack.weights_T
        old_T = pack.token_columns.get(OLD, logps_T.detach())
        sequences = Sequences(pack.segments_T, pack.sequences, pack.sequence_sums)
        advantages_N = pack.columns[ADVANTAGE].to(logps_T.dtype)
        advantages_T, teacher_T = sequences.spread(advantages_N), None
        if "teacher_kl" in self.metrics:
            teacher_T = torch.where(mask_T > 0, of_teacher(pack.token_columns[TEACHER], old_T), 0.0)
            advantages_T = advantages_T + self._grpo.teacher_kl_coef * teacher_T
        return _Row(
            logps_T=logps_T,
            mask_T=mask_T,
            log_ratio_T=torch.where(mask_T > 0, logps_T - old_T, 0.0),
            advantages_N=advantages_N,
            advantages_T=advantages_T,
            teacher_T=teacher_T,
            sequences=sequences,
        )

    def _losses(self, row: _Row, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """[T]: each token's loss before corrections; and what is measured of each token, by name."""
        grpo = self._grpo
        level = grpo.importance_sampling_level
        log_T = log_importance(row.logps_T, row.log_ratio_T, row.mask_T, row.sequences, level=level)
        log_T = torch.where(row.mask_T > 0, log_T, 0.0)
        ratio_T = ratio_of(log_T)
        losses_T = self._surrogate(row, ratio_T, log_T, pack)
        if self._selects:
            losses_T = weighed(losses_T, pack.token_columns[_KEPT])
        found_T = {"ratio": ratio_T}
        if grpo.loss_type != "real":
            found_T |= self._clips(ratio_T, row.advantages_T)
        if self._has_kl:
            found_T["kl"] = k3(row.logps_T, pack.token_columns[REFERENCE], row.mask_T)
            losses_T = losses_T + grpo.beta * found_T["kl"]
        if row.teacher_T is not None:
            found_T["teacher_kl"] = -row.teacher_T
        return losses_T, found_T

    def _surrogate(self, row: _Row, ratio_T: Tensor, log_T: Tensor, pack: Pack) -> Tensor:
        grpo, advantages_T = self._grpo, row.advantages_T
        low, high = grpo.epsilon, resolved(grpo.epsilon_high)
        if grpo.loss_type == "real":
            return torch.zeros_like(ratio_T)
        if grpo.loss_type == "cispo":
            return truncated(ratio_T, row.logps_T, advantages_T, high=high)
        if grpo.loss_type == "sapo":
            return gated(ratio_T, advantages_T, tau_pos=grpo.tau_pos, tau_neg=grpo.tau_neg)
        losses_T = clipped(ratio_T, advantages_T, low=low, high=high, delta=grpo.delta, log_T=log_T)
        return losses_T * self._influence(row, ratio_T, pack) if grpo.loss_type == "fipo" else losses_T

    def _influence(self, row: _Row, ratio_T: Tensor, pack: Pack) -> Tensor:
        grpo = self._grpo
        future = partial(discounted_future, decay=2 ** (-1 / grpo.fipo_decay_rate))
        return future_influence(
            row.log_ratio_T,
            ratio_T,
            row.advantages_T,
            partial(pack.over_whole_row, future),
            clip_range=grpo.fipo_clip_range,
            high_only=grpo.fipo_clip_high_only,
            safety_threshold=grpo.fipo_safety_threshold,
            delta=grpo.delta,
        )

    def _clips(self, ratio_T: Tensor, advantages_T: Tensor) -> dict[str, Tensor]:
        """Tokens whose ratio the clipping holds back: below for bad completions, above for good ones."""
        high = resolved(self._grpo.epsilon_high)
        top = high if self._grpo.loss_type == "cispo" else 1 + high
        return {
            "clip_low": (ratio_T < 1 - self._grpo.epsilon) & (advantages_T < 0),
            "clip_high": (ratio_T > top) & (advantages_T > 0),
        }

    def _stays(self, row: _Row, sampled_T: Tensor | None) -> Tensor:
        """[N] fp32: 0 for completions that are too far from the policy."""
        delta = self._grpo.off_policy_sequence_mask_delta
        if delta is None:
            return torch.ones_like(row.advantages_N)
        old_T = row.logps_T.detach() - row.log_ratio_T.detach() if sampled_T is None else sampled_T
        far_N = is_too_far(row.logps_T.detach(), old_T, row.mask_T, row.advantages_N, row.sequences, delta=delta)
        return (~far_N).to(row.logps_T.dtype)

    def _of_completions(self, sums_N: Tensor, counts_N: Tensor, stays_N: Tensor) -> tuple[Tensor, Tensor]:
        """The numerator and this micro-batch's share of the denominator."""
        if self.norm is not Norm.SEQUENCES:
            kept_N = counts_N * stays_N if self.norm is Norm.MICRO_BATCH else counts_N
            return sums_N.sum(), kept_N.sum()
        length = self._longest if self._grpo.loss_type == "dr_grpo" else counts_N.clamp(min=1)
        return (sums_N / length).sum(), sums_N.new_tensor(float(len(sums_N)))

    def _of_prompts(self, row: _Row, kl_N: Tensor, stays_N: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """real: the classification of each prompt's completions, plus the mean of their KL terms. Args: `kl_N`: each
        completion's mean of beta times the KL term."""
        prompts = int(pack.items_N[-1]) + 1 if pack.sequences else 0
        scores_N = row.sequences.means(row.log_ratio_T, row.mask_T)
        is_there_N = (row.sequences.sums(row.mask_T) > 0) & (stays_N > 0)
        loss_P = classified(
            scores_N, row.advantages_N > 0, is_there_N, pack.items_N, prompts=prompts, tau=self._grpo.real_tau
        )
        total = loss_P.sum() + (kl_N * stays_N).sum() / self._grpo.num_generations
        return total, total.new_tensor(float(prompts))
