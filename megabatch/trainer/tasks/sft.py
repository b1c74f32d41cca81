"""Supervised fine-tuning and pre-training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.evaluation.perplexity import with_perplexity
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.sft import Sft
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts

_MOST_CHANNELS = 512
"""As many curves as anyone can look at; a column with more values does not hold channels."""


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Next-token prediction over a dataset, exported as a Hugging Face or PEFT folder. Raises: DataError."""
    export = export_of(run, source)
    if run.recipe.data.streaming:
        objective = _objective(run)
        streamed, evaluator = open_stream(run, source, ranks, objective, busy=busy)
        return Parts(steps=streamed, objective=objective, evaluator=with_perplexity(evaluator), export=export)
    tokens = open_tokens(run, source, ranks, busy=busy)
    objective = _objective(run, channels=checked_channels(tokens.channels))
    steps, evaluator = steps_of(run, ranks, tokens, objective)
    return Parts(steps=steps, objective=objective, evaluator=with_perplexity(evaluator), export=export)


def _objective(run: RunConfig, *, channels: Sequence[str] = ()) -> Sft:
    training = run.recipe.training
    return Sft(
        calculate_per_token_loss=resolved(training.calculate_per_token_loss),
        dynamic=training.enable_dft_loss,
        channels=channels,
    )


def checked_channels(channels: Sequence[str]) -> Sequence[str]:
    """Raises: DataError for too many channels, or for a channel whose metric would take another metric's name."""
    if len(channels) > _MOST_CHANNELS:
        raise DataError(
            f"training.enable_channel_loss=True: the data's column 'channel' has {len(channels):,} values, above "
            f"{_MOST_CHANNELS}; name another column with data.columns, or join channels"
        )
    names = Counter(f"{name}{part}" for name in _metrics(channels) for part in ("", "_sum", "_count"))
    if twice := [channel for channel in channels if names[f"loss_{channel}"] > 1]:
        raise DataError(
            f"training.enable_channel_loss=True: the channel {twice[0]!r} would be logged as loss_{twice[0]}, which "
            "is another metric's numerator or count; give it another name"
        )
    return channels


def _metrics(channels: Sequence[str]) -> list[str]:
    return ["loss", *(f"loss_{channel}" for channel in channels)]
