"""Generative rerankers: a language model answers yes or no, and the first of these tokens is the score."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.reranker import Reranker as Group
from megabatch.config.run import RunConfig
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.answers import Answers
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.reranker import parts_with


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError, also for an answer that is no token."""
    group = run.recipe.reranker
    return parts_with(ranks.on_main(lambda: answers_of(group, source)), run, source, ranks, busy=busy)


def answers_of(group: Group, source: ModelSource) -> Answers:
    tokenizer = tokenizers.load(source.tokenizer)
    names = ("generative_reranker_positive_token", "generative_reranker_negative_token")
    return Answers(*(tokenizers.entry(tokenizer, getattr(group, name), field=f"reranker.{name}") for name in names))
