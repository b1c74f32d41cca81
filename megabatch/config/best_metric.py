"""Which way a metric is better: for a run's best checkpoint, and for the ranking of a sweep's runs."""

from __future__ import annotations

from megabatch.config.checkpoint import Checkpoint

_LESS_IS_BETTER = ("loss", "nll", "perplexity", "kl", "ece", "brier", "mse", "mae", "_s", "_gib")
"""How names of metrics end of which less is better; `tokens_per_s` and other rates are none of them."""


def less_is_better(metric: str, group: Checkpoint) -> bool:
    """As `greater_is_better` says of `metric_for_best_model`; else by the metric's name.

    Args: metric: with or without `eval_` before it; of `metric_for_best_model` it makes no difference.
    """
    chosen = (group.metric_for_best_model or "").removeprefix("eval_")
    if group.greater_is_better is not None and metric.removeprefix("eval_") == chosen:
        return not group.greater_is_better
    return metric.endswith(_LESS_IS_BETTER) and not metric.endswith("_per_s")
