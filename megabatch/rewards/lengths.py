"""Rewards that follow from a completion's form and length alone: format, cosine, repetition, soft_overlong.

Lengths are tokens of the completion, over all its turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar

from megabatch.rewards.sample import Place, RewardSample, Score
from megabatch.values import dataclass

_BETWEEN = re.compile(r"</think>\s*<answer>")


def format_reward(text: str) -> float:
    """1 for `<think>…</think><answer>…</answer>` and nothing else, white space between the two allowed; else 0.

    The same texts as `^<think>.*?</think>\\s*<answer>.*?</answer>\\Z`, in time linear in their length.
    Source: ms-swift, rewards/orm.py, Format; DeepSeek-R1 (arXiv 2501.12948), section 2.2.2.
    """
    inner = text.removeprefix("<think>").removesuffix("</answer>")
    framed = len(inner) == len(text) - len("<think>") - len("</answer>")
    return float(framed and _BETWEEN.search(inner) is not None)


def cosine_reward(length: int, *, longest: int, at_zero: float, at_longest: float) -> float:
    """From `at_zero` for length 0 to `at_longest` for length `longest` and beyond, along half a cosine.

    r = at_longest + (at_zero - at_longest) · (1 + cos(π · min(length, longest) / longest)) / 2

    Source: arXiv 2502.03373, section 4.2; beyond `longest` ms-swift lets the cosine rise again, we do not.
    """
    phase = math.pi * min(length, longest) / longest
    return at_longest + (at_zero - at_longest) * (1 + math.cos(phase)) / 2


def repetition_reward(text: str, *, size: int, largest: float) -> float:
    """`largest` times the share of n-grams of lower-case words that occurred before; 0 for fewer than `size` words.

    r = largest · (1 - distinct n-grams / n-grams)

    Source: arXiv 2502.03373, appendix; ms-swift, rewards/orm.py, RepetitionPenalty.
    """
    words = text.lower().split()
    count = len(words) - size + 1
    if count < 1:
        return 0.0
    distinct = len(set(zip(*(words[start : start + count] for start in range(size)), strict=True)))
    return largest * (1 - distinct / count)


def soft_overlong_reward(length: int, *, longest: int, ramp: int) -> float:
    """0 up to `longest - ramp` tokens, -1 from `longest` on, linear between.

    Source: DAPO, arXiv 2503.14476, equation 13; beyond `longest` ms-swift goes on below -1, DAPO does not.
    """
    return max(-1.0, min(0.0, (longest - ramp - length) / ramp))


@dataclass(frozen=True, slots=True)
class Format:
    name: ClassVar[str] = "format"
    place: ClassVar[Place] = "here"

    def open(self) -> Score:
        return lambda samples: [format_reward(sample.completion) for sample in samples]


@dataclass(frozen=True, slots=True)
class Repetition:
    size: int
    largest: float
    name: ClassVar[str] = "repetition"
    place: ClassVar[Place] = "here"

    def open(self) -> Score:
        return lambda samples: [
            repetition_reward(sample.completion, size=self.size, largest=self.largest) for sample in samples
        ]


@dataclass(frozen=True, slots=True)
class SoftOverlong:
    longest: int
    ramp: int
    name: ClassVar[str] = "soft_overlong"
    place: ClassVar[Place] = "here"

    def open(self) -> Score:
        return lambda samples: [
            soft_overlong_reward(len(sample.ids), longest=self.longest, ramp=self.ramp) for sample in samples
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """Depends on whether the answer is right, so it is computed from the accuracy that was found."""

    longest: int
    wrong: tuple[float, float]
    """Reward of a wrong answer of length 0, and of the longest."""
    right: tuple[float, float]
    name: ClassVar[str] = "cosine"

    def of(self, samples: Sequence[RewardSample], accuracy: Sequence[float]) -> list[float]:
        """NaN where the accuracy is NaN; an answer is right if its accuracy is at least 1."""
        return [
            math.nan if math.isnan(right) else self._one(len(sample.ids), right=right >= 1)
            for sample, right in zip(samples, accuracy, strict=True)
        ]

    def _one(self, length: int, *, right: bool) -> float:
        at_zero, at_longest = self.right if right else self.wrong
        return cosine_reward(length, longest=self.longest, at_zero=at_zero, at_longest=at_longest)
