"""Distillation: a student follows a teacher's distribution over each next token of answers, whoever wrote them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.several_teachers import teachers_named
from megabatch.ledger.writer import Ledger
from megabatch.run_directory import RunDirectory
from megabatch.trainer.data.dataset import Dataset, open_data, share_of
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.gkd import (
    TEACHER,
    Gkd,
    GkdOfTop,
    GkdOfWhole,
    GkdSettings,
    frozen_teachers,
    teacher_name,
)
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.top_tokens import TopTokens
from megabatch.trainer.rl.generating import sampling_of
from megabatch.trainer.rl.prompts import open_language
from megabatch.trainer.rl.written import Writing, WrittenSteps
from megabatch.trainer.steps import Steps
from megabatch.trainer.sync.open import open_rollouts
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.served_models import served_teacher
from megabatch.trainer.tasks.teacher import Teacher, teacher_of

logger = logging.getLogger(__name__)


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Conversations of a dataset or a stream, and a teacher. Raises: MegabatchError."""
    group = run.recipe.gkd
    teachers = [] if group.teacher_model_server is not None else _teachers(run, source, ranks)
    writing = _writing(run, source, teachers, ranks) if group.lmbda or group.seq_kd else None
    objective = _objective(run, source, teachers, ranks)
    opened = open_stream if run.recipe.data.streaming else open_data
    steps, evaluator = opened(run, source, ranks, objective, busy=busy)
    return Parts(
        steps=steps if writing is None else _with_answers(steps, writing, run, ranks),
        objective=objective,
        evaluator=evaluator,
        export=export_of(run, source),
        frozen=_frozen(run, teachers, ranks),
    )


def _teachers(run: RunConfig, source: ModelSource, ranks: Ranks) -> list[Teacher]:
    named = teachers_named(resolved(run.recipe.gkd.teacher_model), "model")
    for one in named:
        if one.tags:
            logger.info(
                "%s teaches the rows with %s=%s", one.where, run.recipe.gkd.teacher_tag_key, " or ".join(one.tags)
            )
    found = [teacher_of(run, one.where, source, ranks) for one in named]
    found[0].beside(found[1:])
    return found


def _frozen(run: RunConfig, teachers: Sequence[Teacher], ranks: Ranks) -> dict[str, Model]:
    if len(teachers) == 1:
        return {TEACHER: teachers[0].frozen(run, ranks)}
    return {teacher_name(number): one.frozen(run, ranks) for number, one in enumerate(teachers)}


def _with_answers(steps: Steps, writing: Writing, run: RunConfig, ranks: Ranks) -> WrittenSteps:
    assert isinstance(steps, Dataset), "a rule of the config: the prompts of a stream are not drawn again"
    return WrittenSteps(dataset=steps, writing=writing, ledger=_ledger(run) if ranks.is_main else None)


def _objective(run: RunConfig, source: ModelSource, teachers: Sequence[Teacher], ranks: Ranks) -> Gkd:
    group, topk = run.recipe.gkd, run.recipe.gkd.gkd_logits_topk
    settings = GkdSettings(beta=group.beta, temperature=run.recipe.rollout.temperature, sft_alpha=group.sft_alpha)
    if not teachers:
        return GkdOfTop(settings, served_teacher(run, source, ranks), topk=resolved(topk))
    if topk is None:
        return GkdOfWhole(settings, [teacher.taken_output_layer(run, ranks) for teacher in teachers])
    likeliest = TopTokens(topk, run.shape.vocab_size)
    return GkdOfTop(settings, frozen_teachers([likeliest] * len(teachers)), topk=topk)


def _writing(run: RunConfig, source: ModelSource, teachers: Sequence[Teacher], ranks: Ranks) -> Writing:
    """The engines get the teacher's weights here, as long as it has its output layer."""
    recipe, group = run.recipe, run.recipe.gkd
    language, writes = open_language(run, source, ranks), teachers[0] if group.seq_kd else None
    positions = [run.shape, *(teacher.model.shape for teacher in teachers)]
    return Writing(
        lmbda=group.lmbda,
        student=open_rollouts(run, source, ranks) if group.lmbda else None,
        teacher=None if writes is None else writes.engines(run, ranks),
        sampling=sampling_of(recipe.rollout, language),
        language=language,
        seed=recipe.training.seed,
        positions=min(shape.max_position_embeddings for shape in positions),
        packing_length=recipe.data.packing_length,
        sleep_level=recipe.rollout.sleep_level,
        share=share_of(run, ranks),
    )


def _ledger(run: RunConfig) -> Ledger:
    return Ledger(RunDirectory(Path(run.run_dir)).ledger, max_bytes=int(run.recipe.rollout.ledger_gib * 2**30))
