"""Preference optimisation on pairs: DPO and its variants, one or several with weights.

N: sequences of a micro-batch, in pairs with the chosen answer first. P: its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.objectives.objective import REFERENCE, Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.objectives.preference_losses import LOSSES, Pairs, Settings, matched, scores
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.sequences import Sequences

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

_SHARE = "ld_share"
_OF_THE_BATCH = ("aot", "aot_unpaired", "sft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Which losses, of what."""

    losses: Mapping[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    """Name → weight: those of `LOSSES`, and `aot`, `aot_unpaired` and `sft`."""
    settings: Settings
    divergence: str = "reverse_kl"
    """See `scores`."""
    alpha: float = 0.5
    """Of the alpha divergence."""
    ld_alpha: float | None = None
    """Weight of the tokens of an answer beyond the length of the shorter one (arXiv:2409.06411); None for 1."""
    use_weighting: bool = False
    """Whether a pair counts with how likely the policy finds both answers (`_likelihoods`); not for the losses of the
    whole batch."""
    reference_free: bool = False
    """Whether every answer counts as equally likely for the reference."""


class Dpo(Objective):
    """The mean over the pairs of the global batch of the weighted sum of some losses.

    `sft` is the mean over the tokens of the chosen answers of the global batch. `aot` and `aot_unpaired` sort its
    pairs, whatever micro-batches or ranks hold them, so that no layout changes them. Sorting needs the policy's values
    before the step: one more forward pass.
    """

    norm = Norm.ITEMS

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._summed = Sequences(discount=None if variant.ld_alpha is None else _SHARE)
        self.readout: Readout = replace(self._summed, collisions=variant.use_weighting)
        self._logps = "logps" if variant.ld_alpha is None else "discounted"
        self._alone = {name: weight for name, weight in variant.losses.items() if name not in _OF_THE_BATCH}
        own = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
               "logps/rejected")  # fmt: skip
        self.metrics: tuple[str, ...] = ("loss", *own, *(("nll_loss",) if "sft" in variant.losses else ()))

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds the reference's log-probabilities, the lengths, and what the losses need of the whole global batch."""
        if self._variant.reference_free:
            packs = [_with(pack, **{REFERENCE: torch.zeros(pack.sequences)}) for pack in packs]
        elif REFERENCE not in packs[0].columns:
            logps = self.log_probs(packs, inference, model=REFERENCE)
            packs = [_with(pack, **{REFERENCE: one}) for pack, one in zip(packs, logps, strict=True)]
        packs = [self._with_lengths(pack) for pack in packs]
        if "sft" in self._variant.losses:
            packs = _with_pairs_per_token(packs, inference)
        if self._variant.losses.keys() & {"aot", "aot_unpaired"}:
            packs = self._with_matches(packs, inference)
        return packs

    def log_probs(self, packs: Sequence[Pack], inference: Inference, *, model: str = "policy") -> list[Tensor]:
        """See `Compared`; with `ld_alpha`, discounted."""
        found = inference.infer([self._with_lengths(pack) for pack in packs], self._summed, model=model)
        return [one[self._logps] for one in found]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """Uses the columns of `prepare`, each [N] fp32."""
        variant, logps_N = self._variant, out[self._logps]
        ratios_N, tokens_N = logps_N - pack.columns[REFERENCE], pack.columns["tokens"]
        scores_N = scores(ratios_N, variant.divergence, alpha=variant.alpha)
        pairs = Pairs(
            chosen_P=ratios_N[0::2],
            rejected_P=ratios_N[1::2],
            chosen_scores_P=scores_N[0::2],
            rejected_scores_P=scores_N[1::2],
            chosen_tokens_P=tokens_N[0::2],
            rejected_tokens_P=tokens_N[1::2],
        )
        total = logps_N.sum() * 0
        weights_P = _likelihoods(out, tokens_N) if variant.use_weighting else 1.0
        for name, weight in self._alone.items():
            total = total + weight * (LOSSES[name](pairs, variant.settings) * weights_P).sum()
        for name in variant.losses.keys() & set(_OF_THE_BATCH):
            total = total + variant.losses[name] * self._of_the_batch(name, logps_N, out["logps"], pairs, pack)
        count = logps_N.new_tensor(float(len(pairs.chosen_P)))
        metrics = {"loss": Mean(total.detach(), count), **self._measured(pairs, logps_N, count)}
        if "sft" in variant.losses:
            metrics["nll_loss"] = Mean(-out["logps"][0::2].detach().sum(), pairs.chosen_tokens_P.sum())
        return Terms(per="sequence", numerator=total, weight=count, metrics=metrics)

    def _measured(self, pairs: Pairs, logps_N: Tensor, count: Tensor) -> dict[str, Mean]:
        beta, logps_N = self._variant.settings.beta, logps_N.detach()
        chosen_P, rejected_P = beta * pairs.chosen_P.detach(), beta * pairs.rejected_P.detach()
        return {
            "rewards/chosen": Mean(chosen_P.sum(), count),
            "rewards/rejected": Mean(rejected_P.sum(), count),
            "rewards/accuracies": Mean((chosen_P > rejected_P).float().sum(), count),
            "rewards/margins": Mean((chosen_P - rejected_P).sum(), count),
            "logps/chosen": Mean(logps_N[0::2].sum(), count),
            "logps/rejected": Mean(logps_N[1::2].sum(), count),
        }

    def _of_the_batch(self, name: str, logps_N: Tensor, plain_N: Tensor, pairs: Pairs, pack: Pack) -> Tensor:
        """This micro-batch's share of a loss that depends on the whole global batch, times the batch's pairs."""
        how = self._variant.settings
        if name == "sft":
            return -(plain_N * pack.columns["pairs_per_token"])[0::2].sum()
        if name == "aot":
            return matched(logps_N[0::2] - logps_N[1::2], pack.columns["aot"][0::2], how).sum()
        matches_N = pack.columns["aot_unpaired"]
        of_chosen = matched(pairs.chosen_P, matches_N[0::2], how).sum()
        of_rejected = matched(matches_N[1::2], pairs.rejected_P, how).sum()
        # each value is in one term of the loss, whose other value is constant here: both gradients, the value once
        return of_chosen + of_rejected - of_rejected.detach()

    def _with_lengths(self, pack: Pack) -> Pack:
        """The learned tokens of each sequence, and with `ld_alpha` the share with which each token counts."""
        tokens_N = pack.sequence_sums(pack.weights_T)
        pack = _with(pack, tokens=tokens_N)
        if self._variant.ld_alpha is None:
            return pack
        share_T = _shares(pack, self._variant.ld_alpha)
        return replace(pack, token_columns={**pack.token_columns, _SHARE: share_T})

    def _with_matches(self, packs: Sequence[Pack], inference: Inference) -> list[Pack]:
        """For each value the one of equal rank in the other sample, over the global batch."""
        policy_N = torch.cat(self.log_probs(packs, inference))
        reference_N = torch.cat([pack.columns[REFERENCE].to(policy_N.device) for pack in packs])
        differences_P = policy_N[0::2] - policy_N[1::2], reference_N[0::2] - reference_N[1::2]
        ratios_N = policy_N - reference_N
        paired_P = _of_equal_rank(*differences_P, inference)
        of_chosen_P = _of_equal_rank(ratios_N[0::2], ratios_N[1::2], inference)
        of_rejected_P = _of_equal_rank(ratios_N[1::2], ratios_N[0::2], inference)
        columns = {
            "aot": torch.stack([paired_P, paired_P], dim=1).view(-1),
            "aot_unpaired": torch.stack([of_chosen_P, of_rejected_P], dim=1).view(-1),
        }
        sizes = [pack.sequences for pack in packs]
        split = {name: values.split(sizes) for name, values in columns.items()}
        return [_with(pack, **{name: parts[i] for name, parts in split.items()}) for i, pack in enumerate(packs)]


def _likelihoods(out: Mapping[str, Tensor], tokens_N: Tensor) -> Tensor:
    """exp of the mean over each answer's tokens of log p(token) - log sum_v p_v^2, both answers of a pair multiplied:
    fp32 [P], without gradient. arXiv:2406.11827 (WPO), equation 2 with its alignment of on-policy weights."""
    means_N = (out["logps"].detach() - out["collisions"]) / tokens_N.clamp(min=1.0)
    return (means_N[0::2] + means_N[1::2]).exp()


def _with(pack: Pack, **columns: Tensor) -> Pack:
    return replace(pack, columns={**pack.columns, **columns})


def _shares(pack: Pack, alpha: float) -> Tensor:
    """[T]: 1 for the learned tokens of an answer up to the length of the pair's shorter one, alpha for the rest."""
    learned_T = pack.weights_T > 0
    counts_N = pack.sequence_sums(learned_T.float())
    shorter_P = torch.minimum(counts_N[0::2], counts_N[1::2])
    shorter_S = torch.cat([shorter_P.repeat_interleave(2), shorter_P.new_zeros(1)])
    segments_T = pack.segments_T.long()
    counts_S = torch.cat([counts_N, counts_N.new_zeros(1)]).long()  # of whole numbers, the sums are exact anywhere
    before_S = counts_S.cumsum(0) - counts_S
    place_T = learned_T.long().cumsum(0) - before_S[segments_T]
    return torch.where(place_T <= shorter_S[segments_T], 1.0, alpha)


def _with_pairs_per_token(packs: Sequence[Pack], inference: Inference) -> list[Pack]:
    """The pairs of the global batch divided by the tokens of its chosen answers, as a column."""
    tokens = torch.stack([pack.columns["tokens"][0::2].sum() for pack in packs]).sum()
    pairs = tokens.new_tensor(sum(pack.sequences for pack in packs) / 2)
    device = packs[0].columns["reference"].device
    total = inference.total(torch.stack([pairs, tokens]).to(device))
    factor = total[0] / total[1].clamp(min=1e-20)
    return [_with(pack, pairs_per_token=factor.expand(pack.sequences)) for pack in packs]


def _of_equal_rank(values_P: Tensor, others_P: Tensor, inference: Inference) -> Tensor:
    """For each of this rank's values: the other of the same rank, where both are sorted over the global batch."""
    everyone, first = inference.everyone(torch.stack([values_P, others_P], dim=1))
    order = everyone[:, 0].argsort(stable=True)
    matches = torch.empty_like(order, dtype=values_P.dtype)
    matches[order] = everyone[:, 1].sort(stable=True).values
    return matches[first : first + len(values_P)]
