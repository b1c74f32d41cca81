"""Steps and evaluations that draw from a dataset: what every task but the generating ones shares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.second_layouts import row_units
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.run_caches import build_caches, course, note_data, open_caches, schedule_of, train_iters
from megabatch.data.schedule import Cursor, Interleaving, Schedule
from megabatch.data.tokens.sample import CHANNEL
from megabatch.data.whole_data import require_contrast
from megabatch.trainer.data.batches import Ahead, Batches
from megabatch.trainer.data.global_batch import Share
from megabatch.trainer.engine import Engine
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.objective import Objective
from megabatch.trainer.pack import Pack, row_length_of
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Evaluator, State, Step, Steps
from megabatch.trainer.sums import Ratio

logger = logging.getLogger(__name__)

_OLD_CURSOR = (
    "the checkpoint was written by an older megabatch, which noted the samples' lengths and not their tokens: an edit "
    "of the data since then that left every length as it was would not be noticed. The next checkpoint notes them"
)


@dataclass(frozen=True, slots=True)
class Dataset(Steps):
    """A run's training data as steps."""

    data: TokenCache
    schedule: Schedule
    batches: Batches
    train_iters: int

    @property
    def course(self) -> str:  # type: ignore[override]
        return course(self.schedule, self.data, self.train_iters)

    def require(self, cursor: State) -> None:
        found = Cursor.from_json(cursor)
        self.schedule.require_own(found)
        if not found.knows_content:
            logger.warning(_OLD_CURSOR)

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        return self.batches.train(Cursor.from_json(cursor))

    def places(self, pack: Pack) -> Sequence[str]:
        origins = zip(pack.columns["source"].tolist(), pack.columns["number"].tolist(), strict=True)
        return [str(self.data.place(source, number)) for source, number in origins]


@dataclass(frozen=True, slots=True)
class Validation(Evaluator):
    """The objective's metrics over validation data, each sample once."""

    batches: Batches
    objective: Objective
    eval_iters: int
    """Batches to take; all of them when it is negative."""

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        def packs() -> Iterator[list[Pack]]:
            for step in self.batches.evaluate(eval_iters=self.eval_iters):
                yield step.packs
                on_batch()

        return engine.evaluate(packs(), self.objective)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run's tokenised data, the same on every rank."""

    train: TokenCache
    validation: TokenCache | None

    @property
    def channels(self) -> Sequence[str]:
        """Names that the samples' column `channel` indexes, in both parts; empty without that column."""
        return self.train.names[CHANNEL].names if CHANNEL in self.train.names else ()


def open_tokens(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Tokens:
    """Tokenises on one rank what no cache holds yet, and opens it on all; collective.

    Args: `busy` is called whenever some hundred rows are tokenised. Raises: DataError.
    """
    paths = ranks.on_main(lambda: build_caches(run, source.tokenizer, on_chunk=busy))
    tokens = Tokens(*_with_common_channels(*open_caches(run, paths)))
    require_contrast(run, tokens.train)
    return tokens


def _with_common_channels(train: TokenCache, validation: TokenCache | None) -> tuple[TokenCache, TokenCache | None]:
    """Both numbered in one list: validation may have channels that training lacks."""
    parts = [train] if validation is None else [train, validation]
    if CHANNEL not in train.names:
        return train, validation
    channels = sorted({name for part in parts for name in part.names[CHANNEL].names})
    train = train.numbered(CHANNEL, channels)
    return train, None if validation is None else validation.numbered(CHANNEL, channels)


def open_data(
    run: RunConfig, source: ModelSource, ranks: Ranks, objective: Objective, *, busy: Callable[[], None]
) -> tuple[Dataset, Validation | None]:
    """Steps and evaluation for an objective that asks nothing of the data. Args and errors as of `open_tokens`."""
    return steps_of(run, ranks, open_tokens(run, source, ranks, busy=busy), objective)


def steps_of(run: RunConfig, ranks: Ranks, tokens: Tokens, objective: Objective) -> tuple[Dataset, Validation | None]:
    """Steps and evaluation over tokenised data. Raises: DataError."""
    train, validation = tokens.train, tokens.validation
    schedule = schedule_of(run, train)
    if not run.only_evaluates:
        schedule.require_a_batch()
    if ranks.is_main:
        note_data(run, train, schedule)
    batches = Batches(train, schedule, share=padded_share(run, ranks, train, schedule), ahead=ahead_of(run, ranks))
    steps = Dataset(train, schedule, batches, train_iters(run, schedule))
    return steps, validation_of(run, ranks, validation, objective)


def validation_of(
    run: RunConfig, ranks: Ranks, validation: TokenCache | None, objective: Objective
) -> Validation | None:
    """The evaluation, if the run has validation data and evaluates."""
    eval_iters = run.recipe.evaluation.eval_iters
    if validation is None or eval_iters == 0:
        return None
    once = schedule_of(run, validation, shuffle=False)
    share = padded_share(run, ranks, validation, once)
    return Validation(Batches(validation, once, share=share, ahead=ahead_of(run, ranks)), objective, eval_iters)


def ahead_of(run: RunConfig, ranks: Ranks) -> Ahead:
    """How this rank prepares steps."""
    data = run.recipe.data
    return Ahead(
        workers=data.num_workers,
        each=data.dataloader_prefetch_factor,
        pinned=data.dataloader_pin_memory and ranks.device.type == "cuda",
    )


def padded_share(run: RunConfig, ranks: Ranks, data: TokenCache, schedule: Schedule) -> Share:
    """This rank's share; pads all rows to the longest if the recipe asks for that."""
    share = share_of(run, ranks)
    if not run.recipe.data.pad_to_max_length:
        return share
    own: np.ndarray = data.lengths - (data.shared(np.arange(len(data))) if share.shares_prompts else 0)
    padded: np.ndarray = -(-own // share.sequence_multiple) * share.sequence_multiple
    return replace(share, row_length=_longest_row(run, schedule, padded, share.row_multiple))


def share_of(run: RunConfig, ranks: Ranks) -> Share:
    """This rank's part of every global batch."""
    recipe, (sequence_multiple, row_multiple) = run.recipe, row_units(run.recipe)
    return Share(
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        interleaving=_interleaving(run),
        row_multiple=row_multiple,
        sequence_multiple=sequence_multiple,
        equal_rows=_equal_rows(run),
        equal_sequences=not recipe.data.padding_free,
        shares_prompts=resolved(recipe.rlhf.share_prompts),
        hidden_size=run.shape.hidden_size,
    )


def _interleaving(run: RunConfig) -> Interleaving:
    if run.layout.vp == 1:
        return Interleaving()
    return Interleaving(run.layout.pp, resolved(run.recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage))


def _longest_row(run: RunConfig, schedule: Schedule, padded: np.ndarray, row_multiple: int) -> int:
    """Tokens of the longest row that the data can make.

    Args: `padded`: length of each sample's sequence in a row, which may fill a pack beyond its length.
    """
    data = run.recipe.data
    longest = data.packing_length or resolved(data.max_length)
    return row_length_of([max(longest, schedule.longest(padded)) * run.recipe.batch.micro_batch_size], row_multiple, 1)


def _equal_rows(run: RunConfig) -> int:
    """Neighbours over data parallelism that share experts, where rows or capacities are exchanged as equals.

    megatron-core lays experts over consecutive ranks of a pipeline stage, on which data parallelism comes last.
    """
    moe, layout = run.recipe.moe, run.layout
    if moe.moe_token_dispatcher_type == "allgather" or moe.moe_pad_expert_input_to_capacity:
        return max(1, layout.ep * layout.etp // (layout.tp * layout.cp))
    return 1
