"""Logging and evaluation."""

from __future__ import annotations

import importlib.util
import sys
from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """What is logged, how often, and where to."""

    log_interval: int = param(5, aliases=("logging_steps",), at_least=1)
    """Optimizer steps between lines of the log; `metrics.jsonl` has a line for every step."""
    tensorboard_dir: str | None = param(None)
    """Folder of TensorBoard files; None means `runs` inside the run directory."""
    tensorboard_log_interval: int = param(1, at_least=1)
    """Optimizer steps between TensorBoard points."""
    tensorboard_queue_size: int = param(50, at_least=1)
    """Points buffered before they are written."""
    log_params_norm: bool = param(False)
    """Logs the L2 norm of all parameters."""
    log_throughput: bool = param(False)
    """Logs FLOP/s per GPU, counting only real tokens."""
    log_timers_to_tensorboard: bool = param(True)
    """Logs the times of the parts of a step to TensorBoard."""
    no_log_learning_rate_to_tensorboard: bool = param(False, negated_aliases=("log_learning_rate_to_tensorboard",))
    """Does not log the learning rate to TensorBoard."""
    log_validation_ppl_to_tensorboard: bool = param(True)
    """Logs validation perplexity to TensorBoard."""
    log_memory_to_tensorboard: bool = param(True)
    """Logs memory use to TensorBoard."""
    logging_level: Literal["debug", "info", "warning", "error", "critical"] | None = param(None)
    """Lowest level in a rank's log; None means info on rank 0 and warning on the others."""
    report_to: Literal["wandb", "swanlab"] | None = param(None)
    """Tracker in addition to TensorBoard; its key comes from WANDB_API_KEY or SWANLAB_API_KEY, without which it writes
    offline."""
    wandb_project: str = param("megatron-swift", aliases=("swanlab_project",))
    """Project name in the tracker."""
    wandb_exp_name: str | None = param(None, aliases=("swanlab_exp_name",))
    """Experiment name in the tracker; None means `save`."""
    wandb_save_dir: str | None = param(None)
    """Folder of the tracker's local files; None means `wandb` or `swanlab` inside the run directory."""


TRACKER_KEYS = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY"}
"""The variable that holds the key, by the name of a tracker's package."""


def missing_tracker(package: str) -> str | None:
    """The rule that `report_to` breaks in this Python if the package is not installed."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"needs the package {package}, which {sys.executable} lacks; pip install 'megabatch[{package}]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """When and how long to evaluate on the validation data."""

    eval_iters: int = param(-1, at_least=-1)
    """Global batches per evaluation; -1 evaluates all validation data, 0 none."""
    eval_interval: int | None = param(None, aliases=("eval_steps",), at_least=1)
    """Optimizer steps between evaluations; None means `save_interval`."""
    eval_on_start: bool = param(False)
    """Evaluates once before the first step, as a baseline."""
