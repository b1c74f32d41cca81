"""Preference optimisation on single answers that are labelled good or bad: KTO (arXiv:2402.01306).

N: sequences of a micro-batch: answers, and after each its mismatched one if the loss needs the KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.objectives.objective import REFERENCE, Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.sequences import Sequences

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, kw_only=True, slots=True)
class KtoSettings:
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    uses_kl: bool = True
    """False: `apo_zero_unpaired`, whose KL is 0, on data without mismatched answers."""


class Kto(Objective):
    """The mean over the answers of the global batch of

        desirable_weight · (1 - sigmoid(beta (r - z)))  or  undesirable_weight · (1 - sigmoid(beta (z - r)))

    r: log-ratio of policy and reference; z: max(0, mean log-ratio of the mismatched answers of the global batch),
    without gradient (equations 7 and 8). `apo_zero_unpaired` has z = 0 (arXiv:2408.06266, equation 7 unpaired).
    """

    norm = Norm.SEQUENCES
    readout: Readout = Sequences()
    metrics: tuple[str, ...] = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins",
                                "rewards/accuracies", "logps/chosen", "logps/rejected")  # fmt: skip

    def __init__(self, settings: KtoSettings) -> None:
        self._settings = settings

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds the reference's log-probabilities, the KL, and the numbers of good and bad answers in the batch."""
        if REFERENCE in packs[0].columns:
            reference = [pack.columns[REFERENCE] for pack in packs]
        else:
            reference = self.log_probs(packs, inference, model=REFERENCE)
        packs = [
            replace(pack, columns={**pack.columns, REFERENCE: r}) for pack, r in zip(packs, reference, strict=True)
        ]
        sums = torch.stack([torch.stack([part.sum() for part in _kinds(pack)]) for pack in packs]).sum(0)
        gained = self._gained(packs, inference) if self._settings.uses_kl else sums.new_zeros(1)
        good, bad, mismatched, gain = inference.total(torch.cat([sums.to(gained.device), gained])).unbind()
        kl = (gain / mismatched.clamp(min=1.0)).clamp(min=0.0)
        shared = {"kl": kl, "good": good, "bad": bad}
        packs = [pack.only(pack.columns["matched"] > 0) for pack in packs]
        return [
            replace(pack, columns={**pack.columns, **{k: v.expand(pack.sequences) for k, v in shared.items()}})
            for pack in packs
        ]

    def _gained(self, packs: Sequence[Pack], inference: Inference) -> Tensor:
        """[1]: the log-ratios of this rank's mismatched answers, added up; they go through the policy just here."""
        packs = [pack.only(pack.columns["matched"] == 0) for pack in packs]
        found = [
            ((own - pack.columns[REFERENCE].to(own.device)) * _kinds(pack)[2].to(own.device)).sum()
            for own, pack in zip(self.log_probs(packs, inference), packs, strict=True)
        ]
        return torch.stack(found).sum()[None]

    def log_probs(self, packs: Sequence[Pack], inference: Inference, *, model: str = "policy") -> list[Tensor]:
        """See `Compared`."""
        return [one["logps"] for one in inference.infer(packs, self.readout, model=model)]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """Uses the columns of `prepare`, and `label` and `matched`, each [N] fp32."""
        how, logps_N, kl_N = self._settings, out["logps"], pack.columns["kl"]
        good_N, bad_N, _ = _kinds(pack)
        ratios_N = logps_N - pack.columns[REFERENCE]
        good_losses_N = 1 - torch.sigmoid(how.beta * (ratios_N - kl_N))
        bad_losses_N = 1 - torch.sigmoid(how.beta * (kl_N - ratios_N))
        loss = (how.desirable_weight * good_losses_N * good_N + how.undesirable_weight * bad_losses_N * bad_N).sum()
        answers = (good_N + bad_N).sum()
        per_answer = 2.0 if how.uses_kl else 1.0  # sequences, of which the denominator counts every one
        return Terms(
            per="sequence",
            numerator=loss * per_answer,
            weight=answers * per_answer,
            metrics={
                "loss": Mean(loss.detach(), answers),
                "kl": Mean((kl_N * (good_N + bad_N)).sum(), answers),
                **self._measured(how.beta * ratios_N.detach(), logps_N.detach(), pack),
            },
        )

    def _measured(self, rewards_N: Tensor, logps_N: Tensor, pack: Pack) -> dict[str, Mean]:
        good_N, bad_N, _ = _kinds(pack)
        ahead_N = (rewards_N > self._settings.beta * pack.columns["kl"]).float()
        right_N = ahead_N * good_N + (1 - ahead_N) * bad_N
        return {
            "rewards/chosen": Mean((rewards_N * good_N).sum(), good_N.sum()),
            "rewards/rejected": Mean((rewards_N * bad_N).sum(), bad_N.sum()),
            "rewards/margins": _margin(rewards_N, pack),
            "rewards/accuracies": Mean(right_N.sum(), (good_N + bad_N).sum()),
            "logps/chosen": Mean((logps_N * good_N).sum(), good_N.sum()),
            "logps/rejected": Mean((logps_N * bad_N).sum(), bad_N.sum()),
        }


def _margin(rewards_N: Tensor, pack: Pack) -> Mean:
    """The good answers' mean reward less the bad ones', of a global batch that has both; counts once for a batch."""
    good_N, bad_N, _ = _kinds(pack)
    all_good_N, all_bad_N = pack.columns["good"].clamp(min=1.0), pack.columns["bad"].clamp(min=1.0)
    has_both_N = ((pack.columns["good"] > 0) & (pack.columns["bad"] > 0)).float()
    share_N = (good_N + bad_N) / (pack.columns["good"] + pack.columns["bad"]).clamp(min=1.0)
    total = (has_both_N * rewards_N * (good_N / all_good_N - bad_N / all_bad_N)).sum()
    return Mean(total, (has_both_N * share_N).sum())


def _kinds(pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    """1 for each sequence that is a good answer, a bad one, a mismatched one: [N] each."""
    label_N, matched_N = pack.columns["label"], pack.columns["matched"]
    return label_N * matched_N, (1 - label_N) * matched_N, 1 - matched_N
