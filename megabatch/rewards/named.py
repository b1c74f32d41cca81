"""Rewards by the names that `reward_funcs` gives them, and those of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import zip_longest
from types import MappingProxyType

from megabatch.config.recipe import Recipe
from megabatch.rewards.accuracy import COLUMN as SOLUTION
from megabatch.rewards.accuracy import Accuracy
from megabatch.rewards.code import Code
from megabatch.rewards.environment import Environment
from megabatch.rewards.judge import Judge, fields_of
from megabatch.rewards.lengths import Cosine, Format, Repetition, SoftOverlong
from megabatch.rewards.model import RewardModel
from megabatch.rewards.own import Own, columns_needed, load_function
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import Reward
from megabatch.user_code import names_own_code


def rewards_of(recipe: Recipe) -> Rewards:
    """The recipe's rewards in the order of their weights: `reward_funcs`, reward models, the environment's."""
    grpo, processes = recipe.grpo, recipe.rewards
    functions = [Own(text) if names_own_code(text) else NAMED[text](recipe) for text in grpo.reward_funcs]
    models = [
        RewardModel(
            path=path,
            plugin=None if plugin in (None, "default") else plugin,
            device=processes.reward_model_device,
            aggregation=processes.reward_step_aggregation,
            step_separator=processes.reward_step_separator,
        )
        for path, plugin in zip_longest(grpo.reward_model, grpo.reward_model_plugin)
    ]
    return Rewards(
        [*functions, *models, *([Environment()] if recipe.rollout.use_gym_env else [])],
        weights=grpo.reward_weights,
        workers=processes.reward_workers,
        timeout_s=processes.reward_timeout_s,
    )


def check_reward(text: str) -> None:
    """Raises: ConfigError where a known entry of `reward_funcs` cannot be used on this machine."""
    if names_own_code(text):
        load_function(text)
    elif text in ("accuracy", "cosine"):
        Accuracy().open()


def lacking(text: str, recipe: Recipe, columns: Collection[str]) -> str | None:
    """Which column an entry of `reward_funcs` cannot do without and no row has, as a rule; None where all are there.

    Args: columns: names that some row has for rewards. Raises: ConfigError where the reward cannot be used here.
    """
    if names_own_code(text):
        absent = [name for name in columns_needed(text) if name not in columns]
        return f"takes the argument {absent[0]}" if absent else None
    if text == "judge":
        named = fields_of(recipe.rewards.judge_prompt)
        absent = [name for name in named if name not in columns]
        return f"sends judge_prompt with {{{absent[0]}}}" if absent else None
    readable = _COLUMNS.get(text, ())
    return f"needs the column {' or '.join(readable)}" if readable and not {*columns} & {*readable} else None


def check_plugin(text: str) -> None:
    """Raises: ConfigError where an entry of `reward_model_plugin` cannot be used on this machine."""
    if text != "default":
        load_function(text, needed="outputs")


def plugin_lacking(text: str, columns: Collection[str]) -> str | None:
    """`lacking`, of an entry of `reward_model_plugin`."""
    needed = [] if text == "default" else columns_needed(text, needed="outputs")
    absent = [name for name in needed if name not in columns]
    return f"takes the argument {absent[0]}" if absent else None


_COLUMNS = {"accuracy": (SOLUTION,), "cosine": (SOLUTION,), "code": ("tests", "input_output")}
"""Columns of which shipped rewards need one in every row."""


def _cosine(recipe: Recipe) -> Cosine:
    grpo = recipe.grpo
    return Cosine(
        longest=grpo.cosine_max_len or recipe.rollout.max_completion_length,
        wrong=(grpo.cosine_min_len_value_wrong, grpo.cosine_max_len_value_wrong),
        right=(grpo.cosine_min_len_value_correct, grpo.cosine_max_len_value_correct),
    )


def _soft_overlong(recipe: Recipe) -> SoftOverlong:
    ramp = recipe.grpo.soft_cache_length
    assert ramp is not None, "a rule of the config"
    return SoftOverlong(recipe.grpo.soft_max_length or recipe.rollout.max_completion_length, ramp)


def _judge(recipe: Recipe) -> Judge:
    settings = recipe.rewards
    assert settings.judge_base_url is not None and settings.judge_model is not None, "a rule of the config"
    return Judge(
        base_url=settings.judge_base_url,
        model=settings.judge_model,
        key_variable=settings.judge_api_key_variable,
        prompt=settings.judge_prompt,
        timeout_s=settings.judge_timeout_s,
        tries=settings.judge_tries,
        at_a_time=settings.judge_concurrency,
    )


NAMED: Mapping[str, Callable[[Recipe], Reward | Cosine]] = MappingProxyType({
    "accuracy": lambda recipe: Accuracy(),
    "format": lambda recipe: Format(),
    "cosine": _cosine,
    "repetition": lambda recipe: Repetition(recipe.grpo.repetition_n_grams, recipe.grpo.repetition_max_penalty),
    "soft_overlong": _soft_overlong,
    "code": lambda recipe: Code(
        seconds=recipe.rewards.code_timeout_s,
        memory_mib=recipe.rewards.code_memory_mib,
        at_a_time=recipe.rewards.reward_workers,
    ),
    "judge": _judge,
})  # fmt: skip
"""How each shipped reward is made from a recipe."""
