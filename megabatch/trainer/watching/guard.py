"""Whether a step's update is taken: guards against losses and gradients that are no numbers, and against spikes.

Every rank judges by numbers that all ranks have, from nothing but the steps before, so all of them decide the same, in
every layout and after every resume. Only where something is found do they talk: which ranks, which samples.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megabatch.config.watching import Watching
from megabatch.errors import MegabatchError
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Step, Steps
from megabatch.trainer.sums import Measured, Ratio

logger = logging.getLogger(__name__)

Action = Literal["stop", "skip", "warn"]

_NAMED = 16
"""Samples that a message names; `incidents.jsonl` has all of them."""
_WORDS: dict[Action, tuple[str, str]] = {
    "stop": (
        "step {}:",
        "; lower learning_rate.lr, warm up for longer, or look at its samples. The last checkpoint is from before it",
    ),
    "skip": ("the update of step {} is skipped:", ""),
    "warn": ("step {} looks wrong, and its update is taken all the same:", ""),
}
"""How a message begins, and how what is wrong goes on. `why` finds the causes of failures by these beginnings."""


class Seen(NamedTuple):
    """A step as the guard remembers it."""

    loss: float | None
    """None where nothing was learned, such as where every completion was cut off and `overlong_filter` left it out."""
    grad_norm: float | None
    """L2 norm of the gradient of the global batch's loss, before clipping; None where fp16's gradients overflowed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a step, and what the guard does about it."""

    what: str
    action: Action


@dataclass(frozen=True, slots=True)
class Suspect:
    """A micro-batch of a step that something is wrong with."""

    rank: int
    loss: float
    samples: tuple[str, ...]
    """Where they come from."""


def seen_in(metrics: Mapping[str, Ratio], grad_norm: float | None) -> Seen:
    """Args: metrics: of the global batch."""
    loss = metrics["loss"]
    return Seen(loss.value if loss.count or loss.total else None, grad_norm)


def judge(settings: Watching, step: Seen, before: Sequence[Seen]) -> Finding | None:
    """What is wrong with a step, compared with earlier ones; None if nothing is."""
    if not _finite(step):
        return Finding("not finite", settings.check_for_nan_in_loss_and_grad)
    if settings.check_for_spiky_loss is None or 2 * len(before) < settings.spiky_loss_window:
        return None
    for name, value, earlier in zip(("loss", "gradient norm"), step, zip(*before, strict=True), strict=True):
        if value is not None and value > (limit := _mean(earlier) + settings.spiky_loss_sigma * _deviation(earlier)):
            return Finding(f"a spike of the {name}, above {limit:.6g}", settings.check_for_spiky_loss)
    return None


def remembered(settings: Watching, step: Seen, before: Sequence[Seen]) -> tuple[Seen, ...]:
    """The steps to compare the next one with, skipped ones included, so that a lasting change stops being a spike."""
    if settings.check_for_spiky_loss is None or None in step or not _finite(step):
        return tuple(before)
    return (*before, step)[-settings.spiky_loss_window :]


class Guard:
    """Judges the steps of a run and reports what it finds; every method is collective."""

    def __init__(self, settings: Watching, ranks: Ranks, steps: Steps, *, incidents: Path) -> None:
        """Args: `incidents`: the file that gets a line for each finding."""
        self.settings, self.ranks, self.steps, self.incidents = settings, ranks, steps, incidents

    def accepts(self, before: Sequence[Seen], found: Measured, *, number: int, step: Step) -> bool:
        """Whether the update of a step is taken, after those before it.

        Raises: MegabatchError on every rank where it ends the run.
        """
        seen = seen_in(found.metrics, found.grad_norm)
        finding = judge(self.settings, seen, before)
        if finding is None:
            return True
        suspects = self.ranks.gather_on_main(self._suspects(found, step))
        text = self.ranks.on_main(lambda: self._noted(number, seen, step, finding, suspects or []))
        if finding.action == "stop":
            raise MegabatchError(text)
        if self.ranks.is_main:
            logger.warning("%s", text)
        return finding.action == "warn"

    def _suspects(self, found: Measured, step: Step) -> list[Suspect]:
        return [
            Suspect(self.ranks.rank, loss, tuple(self.steps.places(pack)))
            for loss, pack in zip(self._losses(found), step.packs, strict=False)
            if pack.sequences
        ]

    def _losses(self, found: Measured) -> list[float]:
        """Of each of this rank's micro-batches; of rows that are cut over ranks the first rank has them."""
        means = [metrics["loss"] for metrics in found.micro_batches]
        sums = [torch.stack([mean.total, mean.count]).double() for mean in means]
        if sums and self.ranks.cp_size > 1:
            whole = torch.stack(sums)
            dist.all_reduce(whole, group=self.ranks.cp)
            sums = list(whole) if dist.get_rank(self.ranks.cp) == 0 else []
        return [total.item() / (count.item() or math.nan) for total, count in sums]

    def _noted(self, number: int, seen: Seen, step: Step, finding: Finding, suspects: list[list[Suspect]]) -> str:
        worst = ranked([one for of_rank in suspects for one in of_rank])
        record = {"step": number, **seen._asdict(), **asdict(finding), "suspects": [asdict(one) for one in worst]}
        try:
            with open(self.incidents, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            logger.warning("%s cannot be written: %s", self.incidents, e.strerror or e)
        return describe(number, seen, finding, worst, samples=step.samples)


def ranked(suspects: Sequence[Suspect]) -> list[Suspect]:
    """The suspects whose own loss is not finite, if there are any; else all of them, highest loss first."""
    broken = [one for one in suspects if not math.isfinite(one.loss)]
    return broken or sorted(suspects, key=lambda one: (-one.loss, one.rank))


def describe(number: int, seen: Seen, finding: Finding, suspects: Sequence[Suspect], *, samples: int) -> str:
    """The finding in words, with the first of its samples."""
    begin, fix = _WORDS[finding.action]
    named = [
        f"{sample} (rank {one.rank}, loss {one.loss:.6g})"
        for one in suspects
        for sample in one.samples or ("a micro-batch",)
    ]
    more = f" and {len(named) - _NAMED} more, all in incidents.jsonl" if len(named) > _NAMED else ""
    return (
        f"{begin.format(number)} loss={seen.loss}, gradient norm={seen.grad_norm} over {samples} samples, "
        f"{finding.what}{fix}. Its samples, the highest loss first: {', '.join(named[:_NAMED])}{more}"
    )


def _finite(step: Seen) -> bool:
    return all(value is None or math.isfinite(value) for value in step)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
