"""All rewards of a run: a table of one number for each sample and reward, whatever crashes or hangs on the way."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from types import TracebackType
from typing import Any

from megabatch.errors import RewardError
from megabatch.rewards.accuracy import Accuracy
from megabatch.rewards.lengths import Cosine
from megabatch.rewards.pool import Call, Failed, Pool
from megabatch.rewards.sample import NoReward, Reward, RewardSample
from megabatch.values import dataclass

_log = logging.getLogger(__name__)
_NAMED = 3
"""Failed samples of a reward that the log names for each call of `of`; the others are counted."""
_HUNG = 8
"""Samples of a call that are tried one by one before a reward counts as one that hangs on all of them."""
LOADING_S = 900.0
"""Time to load a reward that has a process of its own, such as a model, on top of the time limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What samples are worth, reward by reward."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    """[sample][reward], not weighted; NaN where a sample has no such reward."""
    failures: Mapping[str, int]
    """Reward → number of samples for which it crashed, hung or raised."""

    def total(self, sample: int) -> float:
        """Weighted sum of a sample's rewards without those that are NaN; NaN if it has none."""
        found = [
            weight * value
            for weight, value in zip(self.weights, self.values[sample], strict=True)
            if not math.isnan(value)
        ]
        return sum(found) if found else math.nan

    def named(self, sample: int) -> dict[str, float]:
        return dict(zip(self.names, self.values[sample], strict=True))


class Rewards:
    """The rewards of a run, and the processes that compute them."""

    def __init__(
        self, rewards: Sequence[Reward | Cosine], *, weights: Sequence[float] | None, workers: int, timeout_s: float
    ) -> None:
        """Args: `timeout_s` limits each call of a reward."""
        self.names = tuple(reward.name for reward in rewards)
        self.weights = (1.0,) * len(self.names) if weights is None else tuple(weights)
        assert len(self.weights) == len(self.names), "a rule of the config"
        self._rewards = rewards
        self._workers = workers
        self._shared = Pool(workers, timeout_s=timeout_s)
        self._alone = {
            reward: Pool(1, timeout_s=timeout_s + LOADING_S)
            for reward in rewards
            if not isinstance(reward, Cosine) and reward.place == "alone"
        }

    def of(self, samples: Sequence[RewardSample]) -> Scores:
        """Every reward of every sample; samples of a group stand next to each other.

        Functions get whole groups. Where a call raises, crashes or hangs, its samples are tried one by one: those that
        fail alone have no such reward, and the log names them.
        Raises: RewardError for values that are no rewards, and for a reward that fails for every sample.
        """
        found: dict[Any, list[float]] = {}
        failures: dict[str, int] = {}
        for reward in self._order():
            values, failed = self._scored(reward, samples)
            found[reward] = values
            if failed:
                failures[reward.name] = len(failed)
                _report(reward.name, failed, of=len(samples))
        columns = [
            reward.of(samples, found[Accuracy()]) if isinstance(reward, Cosine) else found[reward]
            for reward in self._rewards
        ]
        return Scores(
            names=self.names,
            weights=self.weights,
            values=tuple(zip(*columns, strict=True)) if columns else ((),) * len(samples),
            failures=failures,
        )

    def close(self) -> None:
        for pool in (self._shared, *self._alone.values()):
            pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self) -> list[Reward]:
        """The rewards to compute, the accuracy once, even if only cosine needs it."""
        return list(dict.fromkeys(Accuracy() if isinstance(reward, Cosine) else reward for reward in self._rewards))

    def _scored(self, reward: Reward, samples: Sequence[RewardSample]) -> tuple[list[float], dict[str, str]]:
        """One value for each sample, and the reason for each sample that failed."""
        if reward.place == "here":
            return [math.nan if value is None else float(value) for value in reward.open()(samples)], {}
        pool = self._alone.get(reward, self._shared)
        calls = _calls(reward, samples, most=1 if reward.place == "alone" else self._workers)
        values: list[float] = []
        failed: dict[str, str] = {}
        for call, result in zip(calls, pool.map(calls), strict=True):
            known = self._one_by_one(pool, call, failed) if isinstance(result, Failed) else result
            for sample, value in zip(call.samples, known, strict=True):
                if isinstance(value, NoReward):
                    failed[sample.key] = value.reason
                values.append(math.nan if value is None or isinstance(value, NoReward) else float(value))
        return values, failed

    def _one_by_one(self, pool: Pool, call: Call, failed: dict[str, str]) -> list[Any]:
        """Once the first `_HUNG` samples have all hung, others of the call are given up: each takes a time limit."""
        singles = [Call(call.reward, [sample]) for sample in call.samples]
        results = pool.map(singles[:_HUNG])
        if len(singles) > _HUNG and all(isinstance(one, Failed) and one.hung for one in results):
            results += [Failed(f"not tried alone: {_HUNG} before it hung")] * (len(singles) - _HUNG)
        else:
            results += pool.map(singles[_HUNG:])
        for sample, result in zip(call.samples, results, strict=True):
            if isinstance(result, Failed):
                failed[sample.key] = result.reason
        return [None if isinstance(result, Failed) else result[0] for result in results]


def _calls(reward: Reward, samples: Sequence[RewardSample], *, most: int) -> list[Call]:
    """At most `most` calls of about equal size, in order, each of whole groups."""
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]
    count = min(most, len(groups))
    edges = [len(groups) * index // count for index in range(count + 1)] if count else []
    return [
        Call(reward, [sample for group in groups[first:last] for sample in group]) for first, last in pairwise(edges)
    ]


def _report(name: str, failed: Mapping[str, str], *, of: int) -> None:
    """Raises: RewardError if no sample has the reward."""
    key, reason = next(iter(failed.items()))
    if len(failed) == of:
        raise RewardError(f"reward {name} failed for all {of} samples; the first is {key}: {reason}")
    for key, reason in list(failed.items())[:_NAMED]:
        _log.warning("reward %s of sample %s is left out: %s", name, key, reason)
    if len(failed) > _NAMED:
        _log.warning("reward %s is left out for %d samples in all", name, len(failed))
