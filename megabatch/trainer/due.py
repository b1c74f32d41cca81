"""At which steps a run evaluates and saves, and which of its evaluations is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megabatch.config.best_metric import less_is_better
from megabatch.config.checkpoint import Checkpoint
from megabatch.config.resolved import resolved
from megabatch.errors import ConfigError
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.sums import Ratio


def is_due(interval: int | None, progress: Progress, group: Checkpoint) -> bool:
    """Whether a step is every `interval`th, or ends every `interval`th epoch; None means every one."""
    reached = progress.ended_epoch if group.save_strategy == "epoch" else progress.step
    return reached > 0 and reached % (interval or 1) == 0


class Best:
    """The best evaluation of a run so far, by one of its metrics."""

    def __init__(self, group: Checkpoint, state: Mapping[str, float] | None) -> None:
        """Args: state: of the run's checkpoint."""
        self.metric = resolved(group.metric_for_best_model).removeprefix("eval_")
        self._sign = -1 if less_is_better(self.metric, group) else 1
        self.state = None if state is None or math.isnan(state["value"]) else state

    def see(self, step: int, found: Mapping[str, Ratio]) -> None:
        """An evaluation; one in which the metric is not defined is not the best. Raises: ConfigError where it lacks
        the metric."""
        if self.metric not in found:
            raise ConfigError(
                f"checkpoint.metric_for_best_model={self.metric} is no metric of this run's evaluation; "
                f"there are {', '.join(found)}"
            )
        value = found[self.metric].value
        least = -math.inf if self.state is None else self._sign * self.state["value"]
        if self._sign * value > least:  # of which nothing is true where the value is NaN
            self.state = {"step": step, "value": value}


def best_of(group: Checkpoint, start: Progress) -> Best | None:
    return None if group.metric_for_best_model is None else Best(group, start.best)


def ended_epoch(before: float, after: float) -> int:
    """The number of the epoch that ended between two shares of the data, 0 where none did."""
    return int(after) if int(after) > int(before) else 0
