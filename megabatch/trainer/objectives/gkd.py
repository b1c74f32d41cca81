"""Distillation: the student's distribution over each next token follows a teacher's (arXiv:2306.13649).

T: tokens of a micro-batch. K: the teacher's most likely tokens at a position, where these alone are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megabatch.data.tokens.sample import TEACHER_NUMBER
from megabatch.trainer.objectives.objective import Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.teachers_distribution import FromTeacher, HiddenStates, OutputLayer
from megabatch.trainer.readouts.top_tokens import LOGITS, TeachersTokens

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

TEACHER = "teacher"
"""Name of the frozen model."""
BY_STUDENT, BY_TEACHER = "by_student", "by_teacher"
"""Columns of samples whose answer one of the models wrote; all samples of a step have the same."""


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
    sft_alpha: float


class Teacher(Protocol):
    """What a teacher says of each position."""

    def columns(self, packs: Sequence[Pack], inference: Inference) -> list[dict[str, Tensor]]:
        """Columns of tokens for each pack; collective over all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class FrozenTeacher(Teacher):
    """A model beside the student, of which this is read."""

    readout: Readout

    def columns(self, packs: Sequence[Pack], inference: Inference) -> list[dict[str, Tensor]]:
        return inference.infer(packs, self.readout, model=TEACHER)


@dataclass(frozen=True, slots=True)
class FrozenTeachers(Teacher):
    """Several models beside the student, each of which reads the sequences that it teaches."""

    readouts: Sequence[Readout]
    """One of each, of the same fields; widths may differ."""

    def columns(self, packs: Sequence[Pack], inference: Inference) -> list[dict[str, Tensor]]:
        """Rows [T, …] as wide as the widest teacher's. A teacher with no sequence in the global batch does not run."""
        found: list[dict[str, Tensor]] = [{} for _ in packs]
        for number, readout in enumerate(self.readouts):
            kept = [pack.columns[TEACHER_NUMBER] == number for pack in packs]
            if not float(inference.total(torch.stack([one.sum() for one in kept]).sum()[None].float())):
                continue
            its = [pack.only(kept_N) for pack, kept_N in zip(packs, kept, strict=True)]
            said = inference.infer(its, readout, model=teacher_name(number))
            for columns, pack, kept_N, fields in zip(found, packs, kept, said, strict=True):
                self._place(columns, pack, kept_N, fields)
        return found

    def _place(self, columns: dict[str, Tensor], pack: Pack, kept_N: Tensor, fields: Mapping[str, Tensor]) -> None:
        """Puts what is said of the kept sequences where they are in the row."""
        inside = torch.cat([kept_N, kept_N.new_zeros(1)])[pack.segments_T.long()].nonzero()[:, 0]
        for name, values in fields.items():
            if name not in columns:
                width = max(readout.fields[name].shape[0] for readout in self.readouts)
                columns[name] = values.new_zeros((len(pack.ids_T), width))
            columns[name][inside.to(values.device), : values.shape[1]] = values[: len(inside)]


def teacher_name(number: int) -> str:
    """Of the frozen model of one of several teachers."""
    return f"{TEACHER} {number}"


class Gkd(Objective):
    """The mean over the learned tokens of the global batch of divergence - sft_alpha · log p(token).

    Answers that the student wrote have no second term.
    """

    norm = Norm.TOKENS

    def __init__(self, settings: GkdSettings, teacher: Teacher, readout: Readout) -> None:
        """Args: readout: of the student, which reads the teacher's columns."""
        self._settings, self._teacher, self.readout = settings, teacher, readout
        self.metrics: tuple[str, ...] = ("loss", "divergence", *(("nll_loss",) if settings.sft_alpha else ()))

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds what the teacher says of each position. It waits on the host until its micro-batch is computed."""
        found = self._teacher.columns(packs, inference)
        return [
            replace(pack, token_columns={**pack.token_columns, **{name: value.cpu() for name, value in one.items()}})
            for pack, one in zip(packs, found, strict=True)
        ]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        how = self._settings
        apart = (self._apart(out, pack) * pack.weights_T).sum()
        total, weight = apart, pack.weights_T.sum()
        metrics = {"divergence": Mean(apart.detach(), weight)}
        if how.sft_alpha:
            imitated = 0.0 if BY_STUDENT in pack.columns else 1.0
            nll = -(out["logps"] * pack.weights_T).sum() * imitated
            total = total + how.sft_alpha * nll
            metrics["nll_loss"] = Mean(nll.detach(), weight * imitated)
        return Terms(numerator=total, weight=weight, metrics={"loss": Mean(total.detach(), weight), **metrics})

    def _apart(self, out: Mapping[str, Tensor], pack: Pack) -> Tensor:
        """The divergence at each position: [T]."""
        return out["divergence"]


def frozen_teachers(readouts: Sequence[Readout]) -> Teacher:
    """One model beside the student, or several. Args: readouts: one of each."""
    return FrozenTeacher(readouts[0]) if len(readouts) == 1 else FrozenTeachers(readouts)


class GkdOfWhole(Gkd):
    """Over the whole vocabulary."""

    def __init__(self, settings: GkdSettings, layers: Sequence[OutputLayer]) -> None:
        """Args: layers: of one teacher, or of several."""
        readout = FromTeacher(
            layers=layers, beta=settings.beta, temperature=settings.temperature, targets=settings.sft_alpha > 0
        )
        super().__init__(settings, frozen_teachers([HiddenStates(layer) for layer in layers]), readout)


class GkdOfTop(Gkd):
    """Over the teacher's most likely tokens, over which both distributions are normalised."""

    def __init__(self, settings: GkdSettings, teacher: Teacher, *, topk: int) -> None:
        """Args: teacher: of `top_tokens`' columns; topk: K."""
        super().__init__(settings, teacher, TeachersTokens(topk, targets=settings.sft_alpha > 0))

    def _apart(self, out: Mapping[str, Tensor], pack: Pack) -> Tensor:
        how = self._settings
        student_TK = (out["logits"] / how.temperature).log_softmax(dim=1)
        teacher_TK = (pack.token_columns[LOGITS] / how.temperature).log_softmax(dim=1)
        return divergence(student_TK, teacher_TK, how.beta)
