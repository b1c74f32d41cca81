"""The accuracy reward: whether the final answer of a completion equals the row's `solution`, by math-verify.

The answer is what `<answer>…</answer>` holds, else what follows `####` (GSM8K's mark), else what is boxed, or LaTeX
that the text announces as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from megabatch.errors import ConfigError, RewardError
from megabatch.rewards.sample import Place, RewardSample, Score
from megabatch.values import dataclass

COLUMN = "solution"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """1 for a right answer, 0 for a wrong one; no reward where the row's own solution cannot be read."""

    name: ClassVar[str] = "accuracy"
    place: ClassVar[Place] = "shared"

    def open(self) -> Score:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ConfigError("needs math-verify; pip install 'megabatch[rewards]'") from error
        return score


def score(samples: Sequence[RewardSample]) -> list[float | None]:
    """Raises: RewardError for a row without a solution."""
    golds: dict[str, list[Any]] = {}
    return [_one(sample, golds) for sample in samples]


def _one(sample: RewardSample, golds: dict[str, list[Any]]) -> float | None:
    from math_verify import verify

    solution = sample.columns.get(COLUMN)
    if solution is None:
        has = ", ".join(sorted(k for k, v in sample.columns.items() if v is not None)) or "no other columns"
        raise RewardError(f"accuracy needs the column {COLUMN!r}, and the row of sample {sample.key} has {has}")
    text = str(solution)
    if text not in golds:
        golds[text] = _read(_marked(text) or text)
    if not golds[text]:
        return None
    marked = _marked(sample.completion)
    return float(verify(golds[text], _read(marked) if marked else _announced(sample.completion)))


def _marked(text: str) -> str | None:
    """What is between the first `<answer>` and `</answer>`, or follows the last `####` on its line."""
    if match := _ANSWER.search(text):
        return match[1].strip()
    return text.rpartition("####")[2].split("\n", 1)[0].strip() if "####" in text else None


def _read(answer: str) -> list[Any]:
    """Reads a text that is an answer and nothing else, with or without LaTeX's delimiters; [] if it cannot."""
    from math_verify import parse

    return parse(answer, extraction_mode="first_match") or parse(f"${answer}$", extraction_mode="first_match")


def _announced(text: str) -> list[Any]:
    """The boxed answer of a text, else LaTeX that is announced as the answer; [] if there is neither."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    return parse(text, extraction_config=[latex], extraction_mode="first_match")
