"""Distillation: the student's distribution over each next token follows a teacher's (arXiv:2306.13649).

T: tokens of a micro-batch. K: the teacher's most likely tokens at a position, which alone are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.objectives.objective import Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.top_tokens import IDS, LOGITS, TeachersTokens, TopTokens

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

TEACHER = "teacher"
"""Name of the frozen model."""


def divergence(student_TK: Tensor, teacher_TK: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of two log-distributions, in nats (arXiv:2306.13649, equation 1).

    beta · KL(teacher || m) + (1 - beta) · KL(student || m), m = beta · teacher + (1 - beta) · student; its limits are
    KL(teacher || student) at beta = 0 and KL(student || teacher) at 1.

    Args: log-probabilities [T, K]. Returns: [T].
    """
    if beta == 0:
        return _kl(teacher_TK, student_TK)
    if beta == 1:
        return _kl(student_TK, teacher_TK)
    mixed_TK = torch.logaddexp(student_TK + math.log1p(-beta), teacher_TK + math.log(beta))
    return beta * _kl(teacher_TK, mixed_TK) + (1 - beta) * _kl(student_TK, mixed_TK)


def _kl(first_TK: Tensor, second_TK: Tensor) -> Tensor:
    return (first_TK.exp() * (first_TK - second_TK)).sum(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GkdSettings:
    beta: float
    temperature: float
    """Divides the logits of both models."""
    topk: int
    """K; both distributions are normalised over these tokens."""
    sft_alpha: float
    vocab_size: int
    """Of the student."""


class Gkd(Objective):
    """The mean over the learned tokens of the global batch of divergence - sft_alpha · log p(token)."""

    norm = Norm.TOKENS

    def __init__(self, settings: GkdSettings) -> None:
        self._settings = settings
        self.readout = TeachersTokens(settings.topk, targets=settings.sft_alpha > 0)
        self._of_teacher = TopTokens(settings.topk, settings.vocab_size)
        self.metrics: tuple[str, ...] = ("loss", "divergence", *(("nll_loss",) if settings.sft_alpha else ()))

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds the teacher's most likely tokens and their logits."""
        found = inference.infer(packs, self._of_teacher, model=TEACHER)
        return [
            replace(pack, token_columns={**pack.token_columns, IDS: one[IDS], LOGITS: one[LOGITS]})
            for pack, one in zip(packs, found, strict=True)
        ]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        how = self._settings
        student_TK = (out["logits"] / how.temperature).log_softmax(dim=1)
        teacher_TK = (pack.token_columns[LOGITS] / how.temperature).log_softmax(dim=1)
        apart = (divergence(student_TK, teacher_TK, how.beta) * pack.weights_T).sum()
        total, weight = apart, pack.weights_T.sum()
        metrics = {"divergence": Mean(apart.detach(), weight)}
        if how.sft_alpha:
            nll = -(out["logps"] * pack.weights_T).sum()
            total = total + how.sft_alpha * nll
            metrics["nll_loss"] = Mean(nll.detach(), weight)
        return Terms(numerator=total, weight=weight, metrics={"loss": Mean(total.detach(), weight), **metrics})
