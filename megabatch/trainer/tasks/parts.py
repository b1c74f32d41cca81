"""What a task brings to the loop: its steps, its loss, its evaluation, what it saves for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megabatch.config.run import RunConfig
from megabatch.trainer.exports.export import Export
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.objective import Objective
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.references import Following, PolicyWith
from megabatch.trainer.steps import Evaluator, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A task, opened for one run."""

    steps: Steps
    objective: Objective
    evaluator: Evaluator | None
    """None if there is no validation data."""
    export: Export
    frozen: Mapping[str, Model | PolicyWith] = field(default_factory=dict)
    """More models by name, such as a reference or a teacher, for `Engine.infer`: models of their own, or the policy
    with another adapter or none."""
    following: Mapping[str, Following] = field(default_factory=dict)
    """Which of them follow the policy; they are part of checkpoints."""


class Opener(Protocol):
    """The function that each module of `trainer.tasks` provides."""

    def __call__(self, run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
        """Opens the data and everything else the task needs before its model is built; collective.

        Args: `busy`: called from time to time during long work. Raises: MegabatchError on every rank.
        """
        ...
