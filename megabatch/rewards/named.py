"""Rewards by the names that `reward_funcs` gives them, and those of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megabatch.config.grpo import Grpo
from megabatch.config.recipe import Recipe
from megabatch.rewards.accuracy import Accuracy
from megabatch.rewards.lengths import Cosine, Format, Repetition, SoftOverlong
from megabatch.rewards.own import Own, check_own
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import Reward
from megabatch.user_code import names_own_code


def rewards_of(recipe: Recipe) -> Rewards:
    """The recipe's rewards in the order of their weights: `reward_funcs`, then reward models."""
    grpo = recipe.grpo
    made = [_made(text, grpo, recipe.rollout.max_completion_length) for text in grpo.reward_funcs]
    processes = recipe.rewards
    return Rewards(
        made,
        weights=grpo.reward_weights,
        workers=processes.reward_workers,
        timeout_s=processes.reward_timeout_s,
    )


def check_reward(text: str) -> None:
    """Raises: ConfigError where a known entry of `reward_funcs` cannot be used on this machine."""
    if names_own_code(text):
        check_own(text)
    elif text in ("accuracy", "cosine"):
        Accuracy().open()


def _made(text: str, grpo: Grpo, max_completion_length: int) -> Reward | Cosine:
    return Own(text) if names_own_code(text) else NAMED[text](grpo, max_completion_length)


def _cosine(grpo: Grpo, max_completion_length: int) -> Cosine:
    return Cosine(
        longest=grpo.cosine_max_len or max_completion_length,
        wrong=(grpo.cosine_min_len_value_wrong, grpo.cosine_max_len_value_wrong),
        right=(grpo.cosine_min_len_value_correct, grpo.cosine_max_len_value_correct),
    )


def _soft_overlong(grpo: Grpo, max_completion_length: int) -> SoftOverlong:
    assert grpo.soft_cache_length is not None, "a rule of the config"
    return SoftOverlong(grpo.soft_max_length or max_completion_length, grpo.soft_cache_length)


NAMED: Mapping[str, Callable[[Grpo, int], Reward | Cosine]] = MappingProxyType({
    "accuracy": lambda grpo, longest: Accuracy(),
    "format": lambda grpo, longest: Format(),
    "cosine": _cosine,
    "repetition": lambda grpo, longest: Repetition(grpo.repetition_n_grams, grpo.repetition_max_penalty),
    "soft_overlong": _soft_overlong,
})  # fmt: skip
"""How each shipped reward is made from a recipe's GRPO group and the length limit."""
