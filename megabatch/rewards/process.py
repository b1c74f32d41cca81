"""Process reward models: Hugging Face token classifiers that score each step of a completion.

A completion is cut into steps at the separator. Prompt and steps get the tokens that they have in training
(`data.tokens.steps`): the prompt as the chat template renders it, each step's text by itself, the separator behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megabatch.config.rewards import StepAggregation
from megabatch.errors import ConfigError
from megabatch.rewards.sample import RewardSample

WRONG_AND_RIGHT = 2
"""Outputs for each token."""

AGGREGATIONS: Mapping[StepAggregation, Callable[[Sequence[float]], float]] = MappingProxyType({
    "min": min,
    "product": math.prod,
    "last": lambda chances: chances[-1],
    "mean": lambda chances: sum(chances) / len(chances),
})  # fmt: skip


def aggregated(chances: Sequence[float], how: StepAggregation) -> float:
    """One reward from the probabilities that steps are right, from 0 to 1; 0 without steps."""
    return AGGREGATIONS[how](chances) if chances else 0.0


def steps_of(completion: str, separator: str) -> list[str]:
    """The texts between separators, without empty ones."""
    return [step for step in completion.split(separator) if step.strip()]


def separator_of(config: Any, given: str | None, path: str) -> str:
    """The separator that a recipe gives, or config.json of the model. Raises: ConfigError without one."""
    found = given or getattr(config, "step_separator", None)
    if not isinstance(found, str) or not found:
        raise ConfigError(
            f"reward_model={path} scores the steps of a completion, and its config.json has no step_separator; set "
            "rewards.reward_step_separator"
        )
    return found


class StepTokens:
    """Token ids of prompts and completions, and where their steps end."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator
        self._separator_ids = self._ids(separator)

    def encode(self, sample: RewardSample) -> tuple[list[int], list[int]]:
        """(token ids, position of the last token of each step)"""
        prompt: str = self._tokenizer.apply_chat_template(
            [*map(dict, sample.prompt)], tokenize=False, add_generation_prompt=True, **sample.for_templates
        )
        ids, ends = self._ids(prompt), []
        for step in steps_of(sample.completion, self._separator):
            ids += [*self._ids(step), *self._separator_ids]
            ends.append(len(ids) - 1)
        return ids, ends

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found
