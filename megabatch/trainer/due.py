"""At which steps a run evaluates and saves, and which of its evaluations is the best."""

from __future__ import annotations

from collections.abc import Mapping

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
        greater = group.greater_is_better
        self._greater = not self.metric.endswith("loss") if greater is None else greater
        self.state = state

    def see(self, step: int, found: Mapping[str, Ratio]) -> None:
        """An evaluation. Raises: ConfigError where it lacks the metric."""
        if self.metric not in found:
            raise ConfigError(
                f"checkpoint.metric_for_best_model={self.metric} is no metric of this run's evaluation; "
                f"there are {', '.join(found)}"
            )
        value = found[self.metric].value
        if self.state is None or (value > self.state["value"] if self._greater else value < self.state["value"]):
            self.state = {"step": step, "value": value}


def best_of(group: Checkpoint, start: Progress) -> Best | None:
    return None if group.metric_for_best_model is None else Best(group, start.best)


def ended_epoch(before: float, after: float) -> int:
    """The number of the epoch that ended between two shares of the data, 0 where none did."""
    return int(after) if int(after) > int(before) else 0
