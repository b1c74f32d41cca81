"""Rules for rewards: what each needs, and settings that no reward reads."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from megabatch.config.grpo import Grpo
from megabatch.config.recipe import Recipe
from megabatch.config.rewards import SHIPPED, Rewards
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.user_code import names_own_code

_SETTINGS = {"cosine": "cosine", "repetition": "repetition", "soft": "soft_overlong"}
"""First word of a setting's name, and the reward that reads it."""
_OF_REWARD = {"code": "code", "judge": "judge"}
"""The same, for the group `rewards`."""


def _is_grpo(recipe: Recipe) -> bool:
    return recipe.kind is not None and recipe.kind.name == "grpo"


def rewards_are_known(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    for text in recipe.grpo.reward_funcs if _is_grpo(recipe) else ():
        if not names_own_code(text) and text not in SHIPPED:
            rule = f"must be one of {', '.join(SHIPPED)}, or file.py:function"
            yield Fault("grpo.reward_funcs", text, rule, try_=get_close_matches(text, SHIPPED, n=1))


def rewards_have_different_names(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Metrics carry a reward's name: that of the function, for a function."""
    seen: set[str] = set()
    grpo = recipe.grpo
    named = [("reward_funcs", text, text.rpartition(":")[2]) for text in grpo.reward_funcs]
    named += [("reward_model", text, text.rstrip("/").rpartition("/")[2]) for text in grpo.reward_model]
    for field, text, name in named if _is_grpo(recipe) else ():
        if name in seen:
            yield Fault(f"grpo.{field}", text, f"is a second reward of the name {name}; rename it")
        seen.add(name)


def rewards_have_what_they_need(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if not _is_grpo(recipe):
        return
    grpo, default = recipe.grpo, Grpo()
    for name in Grpo.__slots__:
        reward = _SETTINGS.get(name.partition("_")[0])
        if reward and reward not in grpo.reward_funcs and getattr(grpo, name) != getattr(default, name):
            rule = f"has no effect without the reward {reward}"
            yield Fault(f"grpo.{name}", getattr(grpo, name), rule, try_=(f"reward_funcs={reward}",))
    for name in Rewards.__slots__:
        reward = _OF_REWARD.get(name.partition("_")[0])
        value = getattr(recipe.rewards, name)
        if reward and reward not in grpo.reward_funcs and value != getattr(Rewards(), name):
            rule = f"has no effect without the reward {reward}"
            yield Fault(f"rewards.{name}", value, rule, try_=(f"reward_funcs={reward}",))
    if not grpo.reward_model:
        yield from _of_no_model(recipe.rewards)
    if "soft_overlong" in grpo.reward_funcs:
        yield from _ramp(recipe)
    if "judge" in grpo.reward_funcs:
        for name in ("judge_base_url", "judge_model"):
            if getattr(recipe.rewards, name) is None:
                yield Fault(f"rewards.{name}", None, "is missing: the reward judge needs it", bare=True)
        yield from _role(recipe)
    if len(grpo.reward_model_plugin) not in (0, len(grpo.reward_model)):
        rule = f"must be one for each of the {len(grpo.reward_model)} reward models, `default` for its first output"
        yield Fault("grpo.reward_model_plugin", grpo.reward_model_plugin, rule)


def _of_no_model(rewards: Rewards) -> Iterator[Fault]:
    for name in ("reward_step_aggregation", "reward_step_separator"):
        value, default = getattr(rewards, name), getattr(Rewards(), name)
        if value != default:
            rule = "has no effect without grpo.reward_model, of which it concerns process reward models"
            yield Fault(f"rewards.{name}", value, rule, try_=(default,))


def _role(recipe: Recipe) -> Iterator[Fault]:
    kind, _, name = (recipe.rewards.judge_base_url or "").partition(":")
    roles = [role.name for role in recipe.roles]
    if kind == "role" and name not in roles:
        rule = f"must name one of the recipe's roles, {', '.join(roles) or 'which has none'}"
        yield Fault("rewards.judge_base_url", recipe.rewards.judge_base_url, rule, try_=[f"role:{r}" for r in roles])


def _ramp(recipe: Recipe) -> Iterator[Fault]:
    longest, ramp = recipe.grpo.soft_max_length, recipe.grpo.soft_cache_length
    name = "soft_max_length" if longest is not None else "max_completion_length"
    longest = longest or recipe.rollout.max_completion_length
    if ramp is None:
        rule = f"is missing: soft_overlong needs the tokens below {name}={longest} over which its penalty grows"
        yield Fault("grpo.soft_cache_length", None, rule, try_=(max(1, longest // 4),), bare=True)
    elif ramp > longest:
        rule = f"must be at most {name}={longest}"
        yield Fault("grpo.soft_cache_length", ramp, rule, try_=(max(1, longest // 4),))


RULES = (rewards_are_known, rewards_have_different_names, rewards_have_what_they_need)
