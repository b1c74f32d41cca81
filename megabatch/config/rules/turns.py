"""Rules for rollouts of several turns: one environment, and settings that need one."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Rollout
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_NEED_ONE = ("max_turns", "completion_length_limit_scope", "use_gym_env", "turn_timeout_s", "vllm_server_pass_dataset")


def one_environment_answers(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    rollout, default = recipe.rollout, Rollout()
    if recipe.kind is None or recipe.kind.name != "grpo":
        return
    if rollout.multi_turn_scheduler and rollout.gym_env:
        rule = f"is a second environment beside multi_turn_scheduler={rollout.multi_turn_scheduler!r}; name one"
        yield Fault("rollout.gym_env", rollout.gym_env, rule)
    if rollout.multi_turn_scheduler or rollout.gym_env:
        return
    for name in _NEED_ONE:
        if (value := getattr(rollout, name)) != getattr(default, name):
            yield Fault(f"rollout.{name}", value, "has no effect without multi_turn_scheduler or gym_env")


RULES = (one_environment_answers,)
