"""What `data.loss_scale` may say: a base, which decides whose words are learned, and scales that weigh parts of them.

`last_round`, `hermes`, `last_round+ignore_empty_think`, `default+hermes+ignore_empty_think`: the base comes first and
is `default` where none is named; the weights of several scales are multiplied. Names and weights are ms-swift's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise

from megabatch.values import dataclass

BASES = ("default", "last_round", "all")
"""All assistant turns, those after the last user message, or every token."""

Segment = tuple[int, int, float]
"""Characters [start, stop), and the factor on their weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Weights of parts of one assistant turn; text that no entry matches keeps its weight."""

    keywords: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Keyword → its own weight, and the weight of the text from there to the next keyword."""
    patterns: Mapping[str, float] = field(default_factory=dict)
    """Regular expression without groups → weight of its matches; `^` is the turn's start, `.` is any character."""
    questions: Mapping[str, float] = field(default_factory=dict)
    """Text in the message before the turn → weight of the whole turn, without regard to the other entries."""

    def segments(self, text: str, question: str) -> Iterator[Segment]:
        """The parts of a turn that get their own weight, in order."""
        for asked, weight in self.questions.items():
            if asked in question:
                yield 0, len(text), weight
                return
        entries = [*map(re.escape, self.keywords), *self.patterns]
        weights = [*self.keywords.values(), *((weight, 1.0) for weight in self.patterns.values())]
        found = list(re.finditer("|".join(f"({entry})" for entry in entries), text, re.DOTALL))
        ends = [*(match.start() for match in found[1:]), len(text)]
        for match, end in zip(found, ends, strict=False):
            own, following = weights[(match.lastindex or 1) - 1]
            yield match.start(), match.end(), own
            yield match.end(), end, following


_REACT = {
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Thought:": (1.0, 1.0),
    "Final Answer:": (1.0, 1.0),
    "Observation:": (2.0, 0.0),
}

SCALES: Mapping[str, Scale] = {
    "react": Scale(keywords=_REACT),
    "alpha_umi": Scale(keywords={**_REACT, "Next:": (2.0, 2.0)}),
    "qwen": Scale(
        keywords={
            "✿FUNCTION✿:": (2.0, 2.0),
            "✿ARGS✿:": (2.0, 2.0),
            "✿RETURN✿:": (1.0, 1.0),
            "✿RESULT✿:": (2.0, 0.0),
        }
    ),
    "agentflan": Scale(
        keywords={
            **dict.fromkeys(("Name:", "Action:", "ACTION:", "Tool:", "Command", "Arguments:"), (1.0, 3.0)),
            **dict.fromkeys(("action input", "ACTION_INPUT:", "Action Input:"), (1.0, 3.0)),
            **dict.fromkeys(("Thought:", "Final Answer:"), (1.0, 1.0)),
            "Observation:": (2.0, 0.0),
        },
        questions=dict.fromkeys(
            ("What is the tool you want to use", "What are the required parameter names", "What is the value of"), 3.0
        ),
    ),
    "hermes": Scale(patterns={r"<tool_call>.+?</tool_call>": 2.0}),
    # the template may have written the opening tag, and white space behind it, before the turn begins
    "ignore_empty_think": Scale(
        patterns=dict.fromkeys(
            (
                r"^<think>\s*</think>\s*",
                r"^\s*</think>\s*",
                r"^<seed:think><seed:cot_budget_reflect>The current thinking budget is 0, so I will directly start "
                r"answering the question\.</seed:cot_budget_reflect>\n</seed:think>\s*",
                r"^<\|channel>thought\n<channel\|>",
                r"^</mm:think>\s*",
            ),
            0.0,
        )
    ),
    "ignore_think_prefix": Scale(patterns={r"^<think>\n?": 0.0}),
}


@dataclass(frozen=True, slots=True)
class LossScale:
    """A value of `data.loss_scale`, parsed."""

    base: str
    scales: tuple[Scale, ...] = ()

    def segments(self, text: str, question: str = "") -> list[Segment]:
        """Splits a whole assistant turn into parts, each with the product of all scales' weights.

        Args: `question`: the message that the turn answers.
        """
        found = [list(scale.segments(text, question)) for scale in self.scales]
        edges = {edge for segments in found for start, stop, _ in segments for edge in (start, stop)}
        cuts = sorted({0, len(text), *edges})
        return [(start, stop, math.prod(_at(start, segments) for segments in found)) for start, stop in pairwise(cuts)]


@lru_cache(maxsize=8)
def parse(text: str) -> LossScale:
    """Raises: ValueError saying what the text must be."""
    first, *rest = text.split("+")
    base, names = (first, rest) if first in BASES else ("default", [first, *rest])
    for name in names:
        if name in BASES:
            raise ValueError(f"names {name} behind its beginning, where scales stand; begin with {name}")
        if name not in SCALES:
            near = get_close_matches(name, [*BASES, *SCALES], n=1)
            known = f"{', '.join(BASES)}, and behind it with '+' any of {', '.join(SCALES)}"
            raise ValueError(f"must be one of {known}, not {name!r}{f'; try {near[0]}' if near else ''}")
    return LossScale(base, tuple(SCALES[name] for name in names))


def _at(place: int, segments: Sequence[Segment]) -> float:
    return next((weight for start, stop, weight in segments if start <= place < stop), 1.0)
