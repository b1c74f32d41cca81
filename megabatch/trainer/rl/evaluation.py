"""Evaluation of a policy on held-out prompts: rewards of what it generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megabatch.config.grpo import Grpo
from megabatch.config.resolved import resolved
from megabatch.rewards.accuracy import Accuracy
from megabatch.rl.rounds import Rolled, Sum
from megabatch.trainer.engine import Engine
from megabatch.trainer.rl.generating import Generator
from megabatch.trainer.rl.prompts import Prompts
from megabatch.trainer.rl.rolling import measured
from megabatch.trainer.steps import Evaluator
from megabatch.trainer.sums import Ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoEvaluation(Evaluator):
    """`num_generations_eval` completions of each held-out prompt; the most likely one where that is 1."""

    grpo: Grpo
    prompts: Prompts
    generator: Generator
    at_a_time: int
    """Prompts of a batch."""
    eval_iters: int
    """Batches to take; all of them when it is negative."""

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        self.generator.give_policy(engine)
        each, version = resolved(self.grpo.num_generations_eval), self.generator.policy.trained
        made: list[Rolled] = []
        for number, first in enumerate(range(0, len(self.prompts), self.at_a_time)):
            if number == self.eval_iters:
                break
            some = [self.prompts.at(index) for index in range(len(self.prompts))[first : first + self.at_a_time]]
            name = f"eval {version}.{number}"
            made += self.generator.rewarded(self.prompts, some, each=each, name=name, greedy=each == 1)
            on_batch()
        self.generator.rest()
        return {name: Ratio(*sums) for name, sums in self._found(made, each=each, trained=version).items()}

    def _found(self, made: Sequence[Rolled], *, each: int, trained: int) -> dict[str, Sum]:
        names = self.generator.reward_names
        weights = self.grpo.reward_weights or [1.0] * len(names)
        found = dict(measured(made, names, weights, each=each, trained=trained))
        for name in ("advantage", "staleness", "staleness_max"):
            del found[name]
        if each > 1:
            found |= best_of(made, names, each=each)
        return found | self.generator.take_metrics()


def best_of(made: Sequence[Rolled], names: Sequence[str], *, each: int) -> dict[str, Sum]:
    """The best of each prompt's completions, by reward: `<reward>_best`; of the accuracy it is `pass_at_<each>`."""
    found: dict[str, Sum] = {}
    for k, name in enumerate(names):
        rewards_PG = np.array([one.rewards[k] for one in made]).reshape(-1, each)
        known = rewards_PG[~np.isnan(rewards_PG).all(1)]
        best = np.nanmax(known, axis=1) if len(known) else np.zeros(0)
        shown = f"pass_at_{each}" if name == Accuracy.name else f"reward_{name}_best"
        found[shown] = (float((best >= 1).sum() if name == Accuracy.name else best.sum()), float(len(best)))
    return found
