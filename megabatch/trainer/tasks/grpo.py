"""Group relative policy optimisation: prompts, completions of the policy, their rewards, and steps on them."""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.config.lengths import positions
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.served_models import has_teacher
from megabatch.config.shared_prompts import (
    answers_in_a_row,
    dropouts,
    infer_batch_size,
    inferred_answers_in_a_row,
    infers_alone,
)
from megabatch.data.run_caches import note_data
from megabatch.data.schedule import Schedule
from megabatch.errors import MegabatchError
from megabatch.ledger.writer import Ledger
from megabatch.rewards.named import rewards_of
from megabatch.rewards.rewards import Rewards
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import checkpoints
from megabatch.trainer.checkpoints.progress import open_saved
from megabatch.trainer.data.dataset import share_of
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.grpo import TEACHER, GrpoObjective
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.references import PolicyWith
from megabatch.trainer.rl.ahead import Lead
from megabatch.trainer.rl.batch import Batching
from megabatch.trainer.rl.evaluation import GrpoEvaluation
from megabatch.trainer.rl.generating import Generator, Policy, sampling_of
from megabatch.trainer.rl.prompts import Language, Prompts, open_language, open_prompts
from megabatch.trainer.rl.rolling import MODEL, Rolling
from megabatch.trainer.rl.steps import GrpoSteps, Place
from megabatch.trainer.rl.turns import Turns
from megabatch.trainer.sync.open import open_rollouts
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.reference import following, reference_of
from megabatch.trainer.tasks.served_models import served_logps
from megabatch.trainer.tasks.teacher import teacher_of

logger = logging.getLogger(__name__)

ROUNDS = "rounds"
"""Folder in the run directory with rounds that are not done yet."""


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Rounds of generation and the steps on them, exported for Hugging Face or PEFT. Raises: MegabatchError."""
    grpo, rollout = run.recipe.grpo, run.recipe.rollout
    train, validation = open_prompts(run, source, ranks, busy=busy)
    served = served_logps(run, source, ranks)
    generator = _generator(run, source, ranks, busy=busy, scored=served.takes)
    schedule = train.schedule(resolved(grpo.generation_batch_size) // grpo.num_generations)
    ranks.on_main(schedule.require_a_batch)
    if ranks.is_main:
        note_data(run, train.data, schedule)
        _note_passes(run)
    rolling = Rolling(
        grpo=grpo,
        prompts=train,
        schedule=schedule,
        generator=generator,
        batching=batching_of(run, ranks),
        temperature=rollout.temperature,
        lead=_lead(run, train, schedule, generator),
        has_dropout=bool(dropouts(run.recipe)),
        has_teacher=has_teacher(run.recipe.gkd),
        served=served.logps,
    )
    steps = GrpoSteps(
        rolling,
        ranks,
        folder=Path(run.run_dir) / ROUNDS,
        rounds_of_checkpoints=lambda: _rounds_of_checkpoints(RunDirectory(Path(run.run_dir))),
        ledger=_ledger(run) if ranks.is_main else None,
        train_iters=_train_iters(run, schedule),
        global_batch_size=run.recipe.batch.global_batch_size,
    )
    return Parts(
        steps=steps,
        objective=objective_of(run),
        evaluator=_evaluation(run, validation, generator),
        export=export_of(run, source),
        frozen=_frozen(run, source, ranks),
        following=following(run),
    )


def objective_of(run: RunConfig) -> GrpoObjective:
    """The run's loss."""
    grpo, rollout = run.recipe.grpo, run.recipe.rollout
    return GrpoObjective(
        grpo,
        temperature=rollout.temperature,
        max_completion_length=rollout.max_completion_length,
        has_teacher=has_teacher(run.recipe.gkd),
    )


def _frozen(run: RunConfig, source: ModelSource, ranks: Ranks) -> dict[str, Model | PolicyWith]:
    """The reference where the KL term has a weight, and the teacher if there is one; those behind servers are not."""
    found: dict[str, Model | PolicyWith] = {}
    if run.recipe.grpo.beta > 0 and run.recipe.rlhf.ref_model_server is None:
        found[MODEL] = reference_of(run, source, ranks)
    if (teacher := run.recipe.gkd.teacher_model) is not None:
        found[TEACHER] = teacher_of(run, teacher, source, ranks).frozen(run, ranks)
    return found


def _generator(
    run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None], scored: int | None
) -> Generator:
    """Args: scored: tokens of the longest sequence that models behind servers take."""
    language = open_language(run, source, ranks)
    opened: list[Rewards] = []

    def open_rewards() -> tuple[str, ...]:
        opened.append(rewards_of(run.recipe))
        atexit.register(opened[0].close)
        return opened[0].names

    names = ranks.on_main(open_rewards)
    rollouts = open_rollouts(run, source, ranks)
    return Generator(
        ranks=ranks,
        rollouts=rollouts,
        rewards=opened[0] if opened else None,
        reward_names=names,
        language=language,
        sampling=sampling_of(run.recipe.rollout, language),
        policy=Policy(),
        seed=run.recipe.training.seed,
        positions=positions(run.recipe, run.shape),
        sleep_level=run.recipe.rollout.sleep_level,
        busy=busy,
        turns=_turns(run, ranks, language, limits=[rollouts.takes, scored]),
    )


def _turns(run: RunConfig, ranks: Ranks, language: Language, *, limits: Sequence[int | None]) -> Turns | None:
    """Args: limits: of a conversation's tokens, besides the model's own."""
    rollout = run.recipe.rollout
    if not (rollout.multi_turn_scheduler or rollout.gym_env):
        return None
    return Turns(
        ranks=ranks,
        rollout=rollout,
        text=language.text,
        template=language.template,
        positions=min([positions(run.recipe, run.shape), *(limit for limit in limits if limit is not None)]),
    )


def batching_of(run: RunConfig, ranks: Ranks) -> Batching:
    """How the run's completions become rows."""
    grpo, shares = run.recipe.grpo, run.recipe.rlhf.share_prompts
    return Batching(
        share=share_of(run, ranks),
        group=grpo.num_generations if grpo.loss_type == "real" else 1,
        together=answers_in_a_row(run.recipe) if shares else 1,
        infer_batch_size=infer_batch_size(run.recipe),
        inferred_together=inferred_answers_in_a_row(run.recipe) if shares else 1,
        filters_cut_off=grpo.overlong_filter,
    )


def _note_passes(run: RunConfig) -> None:
    if infers_alone(run.recipe):
        logger.info(
            "passes for log-probabilities take completions by %d (grpo.infer_batch_size), %d of a prompt in a row",
            infer_batch_size(run.recipe),
            inferred_answers_in_a_row(run.recipe) if run.recipe.rlhf.share_prompts else 1,
        )


def _lead(run: RunConfig, train: Prompts, schedule: Schedule, generator: Generator) -> Lead | None:
    grpo, rollout = run.recipe.grpo, run.recipe.rollout
    if not rollout.async_generate:
        return None
    return Lead(
        rounds=rollout.max_staleness,
        total=-(-_train_iters(run, schedule) // (grpo.steps_per_generation * grpo.num_iterations)),
        each=grpo.num_generations,
        prompts=train,
        schedule=schedule,
        generator=generator,
    )


def _train_iters(run: RunConfig, schedule: Schedule) -> int:
    """Steps of the run: as said, or of the whole rounds in `max_epochs` passes over the prompts."""
    training, grpo = run.recipe.training, run.recipe.grpo
    if training.train_iters is not None:
        return training.train_iters
    rounds = schedule.train_iters(resolved(training.max_epochs))
    return rounds * grpo.steps_per_generation * grpo.num_iterations


def _ledger(run: RunConfig) -> Ledger:
    return Ledger(RunDirectory(Path(run.run_dir)).ledger, max_bytes=int(run.recipe.rollout.ledger_gib * 2**30))


def _rounds_of_checkpoints(run: RunDirectory) -> set[int]:
    """Rounds that a checkpoint of the run was saved within. One that cannot be read resumes nothing."""
    found = set()
    for checkpoint in checkpoints(run):
        with contextlib.suppress(MegabatchError):
            place = Place.from_json(open_saved(checkpoint).progress.cursor)
            found |= {place.round} if place.taken else set()
    return found


def _evaluation(run: RunConfig, validation: Prompts | None, generator: Generator) -> GrpoEvaluation | None:
    iters, grpo = run.recipe.evaluation.eval_iters, run.recipe.grpo
    if validation is None or iters == 0:
        return None
    each = resolved(grpo.num_generations_eval)
    return GrpoEvaluation(
        grpo=grpo,
        prompts=validation,
        generator=replace(generator, seconds={}, synced={}),
        at_a_time=max(1, resolved(grpo.generation_batch_size) // each),
        eval_iters=iters,
    )
