"""The reward that the environment of a conversation of several turns gives (`use_gym_env`)."""

from __future__ import annotations

from typing import ClassVar

from megabatch.rewards.sample import Place, Score
from megabatch.values import dataclass

COLUMN = "environment_reward"
"""Sum of the turns' rewards; None if no turn has one."""
TURNS = "turns"
"""Column of rewards: the texts of the model's turns."""


@dataclass(frozen=True, slots=True)
class Environment:
    name: ClassVar[str] = "environment"
    place: ClassVar[Place] = "here"

    def open(self) -> Score:
        return lambda samples: [sample.columns[COLUMN] for sample in samples]
