"""Distillation: a student follows a teacher's distribution over each next token of answers, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.ledger.writer import Ledger
from megabatch.run_directory import RunDirectory
from megabatch.trainer.data.dataset import Dataset, open_data, share_of
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.gkd import TEACHER, FrozenTeacher, Gkd, GkdOfTop, GkdOfWhole, GkdSettings
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.top_tokens import TopTokens
from megabatch.trainer.rl.generating import sampling_of
from megabatch.trainer.rl.prompts import open_language
from megabatch.trainer.rl.written import Writing, WrittenSteps
from megabatch.trainer.steps import Steps
from megabatch.trainer.sync.open import open_rollouts
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.served_teacher import served_teacher
from megabatch.trainer.tasks.teacher import Teacher, teacher_of


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Conversations of a dataset or a stream, and a teacher. Raises: MegabatchError."""
    group = run.recipe.gkd
    teacher = None
    if group.teacher_model_server is None:
        teacher = teacher_of(run, resolved(group.teacher_model), source, ranks)
    writing = _writing(run, source, teacher, ranks) if group.lmbda or group.seq_kd else None
    objective = _objective(run, source, teacher, ranks)
    opened = open_stream if run.recipe.data.streaming else open_data
    steps, evaluator = opened(run, source, ranks, objective, busy=busy)
    return Parts(
        steps=steps if writing is None else _with_answers(steps, writing, run, ranks),
        objective=objective,
        evaluator=evaluator,
        export=export_of(run, source),
        frozen={} if teacher is None else {TEACHER: teacher.frozen(run, ranks)},
    )


def _with_answers(steps: Steps, writing: Writing, run: RunConfig, ranks: Ranks) -> WrittenSteps:
    assert isinstance(steps, Dataset), "a rule of the config: the prompts of a stream are not drawn again"
    return WrittenSteps(dataset=steps, writing=writing, ledger=_ledger(run) if ranks.is_main else None)


def _objective(run: RunConfig, source: ModelSource, teacher: Teacher | None, ranks: Ranks) -> Gkd:
    group, topk = run.recipe.gkd, run.recipe.gkd.gkd_logits_topk
    settings = GkdSettings(beta=group.beta, temperature=run.recipe.rollout.temperature, sft_alpha=group.sft_alpha)
    if teacher is None:
        return GkdOfTop(settings, served_teacher(run, source, ranks), topk=resolved(topk))
    if topk is None:
        return GkdOfWhole(settings, teacher.taken_output_layer(run, ranks))
    return GkdOfTop(settings, FrozenTeacher(TopTokens(topk, run.shape.vocab_size)), topk=topk)


def _writing(run: RunConfig, source: ModelSource, teacher: Teacher | None, ranks: Ranks) -> Writing:
    """The engines get the teacher's weights here, as long as it has its output layer."""
    recipe, group = run.recipe, run.recipe.gkd
    language, writes = open_language(run, source, ranks), teacher if group.seq_kd else None
    positions = [run.shape.max_position_embeddings]
    if teacher is not None:
        positions.append(teacher.model.shape.max_position_embeddings)
    return Writing(
        lmbda=group.lmbda,
        student=open_rollouts(run, source, ranks) if group.lmbda else None,
        teacher=None if writes is None else writes.engines(run, ranks),
        sampling=sampling_of(recipe.rollout, language),
        language=language,
        seed=recipe.training.seed,
        positions=min(positions),
        packing_length=recipe.data.packing_length,
        sleep_level=recipe.rollout.sleep_level,
        share=share_of(run, ranks),
    )


def _ledger(run: RunConfig) -> Ledger:
    return Ledger(RunDirectory(Path(run.run_dir)).ledger, max_bytes=int(run.recipe.rollout.ledger_gib * 2**30))
