"""Supervised fine-tuning and pre-training."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.sft import Sft
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Next-token prediction over a dataset, exported as a Hugging Face or PEFT folder. Raises: DataError."""
    objective = Sft(calculate_per_token_loss=resolved(run.recipe.training.calculate_per_token_loss))
    steps, evaluator = open_data(run, source, ranks, objective, busy=busy)
    return Parts(steps=steps, objective=objective, evaluator=evaluator, export=export_of(run, source))
