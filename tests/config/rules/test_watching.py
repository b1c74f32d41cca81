"""Rules of guards and profiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.rules.check import check


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"profile_steps": "12"}, "watching.profile_steps='12' must be the first and the last step with a colon"),
        ({"profile_steps": "12:10"}, "watching.profile_steps='12:10' must be the first and the last step"),
        ({"profile_steps": "0:2"}, "watching.profile_steps='0:2' must be the first and the last step"),
        ({"profile_steps": "1:99999999"}, "must end at step train_iters="),
        ({"profile_steps": "1:2", "profile_ranks": (0, 99999)}, "has 99999, but the "),
        ({"profile_ranks": (1,)}, "has no effect without profile_steps"),
        ({"spiky_loss_window": 16}, "has no effect without check_for_spiky_loss"),
        ({"spiky_loss_sigma": 0.0, "check_for_spiky_loss": "skip"}, "must be above 0"),
    ],
)
def test_faults(fields: dict[str, Any], fault: str, dense: Recipe) -> None:
    recipe = replace(dense, training=replace(dense.training, train_iters=100, max_epochs=None))
    recipe = replace(recipe, watching=replace(recipe.watching, **fields))
    assert any(fault in str(found) for found in check(recipe)), [str(found) for found in check(recipe)]


def test_a_window_at_the_end_of_the_run_is_fine(dense: Recipe) -> None:
    recipe = replace(dense, training=replace(dense.training, train_iters=100, max_epochs=None))
    recipe = replace(recipe, watching=replace(recipe.watching, profile_steps="100:100"))
    assert not [found for found in check(recipe) if found.field.startswith("watching")]
