"""Distillation on a dataset's answers: a student follows a teacher's distribution over each next token."""

from __future__ import annotations

import logging
from collections.abc import Callable

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.gkd import TEACHER, Gkd, GkdSettings
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.teacher import teacher_of

logger = logging.getLogger(__name__)


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Conversations of a dataset or a stream, and a teacher. Raises: MegabatchError."""
    group = run.recipe.gkd
    if group.lmbda:
        logger.info(
            "gkd.lmbda=%g has no effect: distillation does not generate the student's own answers yet, so that every "
            "step trains on the dataset's (off-policy)",
            group.lmbda,
        )
    objective = Gkd(
        GkdSettings(
            beta=group.beta,
            temperature=run.recipe.rollout.temperature,
            topk=resolved(group.gkd_logits_topk),
            sft_alpha=group.sft_alpha,
            vocab_size=run.shape.vocab_size,
        )
    )
    opened = open_stream if run.recipe.data.streaming else open_data
    steps, evaluator = opened(run, source, ranks, objective, busy=busy)
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=evaluator,
        export=export_of(run, source),
        frozen={TEACHER: teacher_of(run, resolved(group.teacher_model), source, ranks)},
    )
