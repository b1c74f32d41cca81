"""Which fields of a recipe name a user's own files, as `file.py:name`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megabatch.config.recipe import Recipe
from megabatch.user_code import names_own_code


def user_code(recipe: Recipe) -> tuple[str, ...]:
    """Every `file.py:name` of a recipe; the files are copied with the code that its job runs."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _each(recipe, note)
    return tuple(found)


def with_user_code(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """The recipe with each `file.py:name` changed."""
    return _each(recipe, change)


def _each(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    def changed(text: str) -> str:
        return change(text) if names_own_code(text) else text

    preprocess = recipe.data.preprocess
    rollout = recipe.rollout
    callbacks = tuple(change(text) for text in recipe.watching.callbacks)
    return replace(
        recipe,
        data=replace(recipe.data, preprocess=preprocess and change(preprocess)),
        watching=replace(recipe.watching, callbacks=callbacks),
        rollout=replace(
            rollout,
            multi_turn_scheduler=rollout.multi_turn_scheduler and changed(rollout.multi_turn_scheduler),
            gym_env=rollout.gym_env and changed(rollout.gym_env),
        ),
        grpo=replace(
            recipe.grpo,
            reward_funcs=tuple(changed(text) for text in recipe.grpo.reward_funcs),
            reward_model_plugin=tuple(changed(text) for text in recipe.grpo.reward_model_plugin),
        ),
    )
