"""The reference's log-probabilities of all data, computed before the first step and stored beside the token cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megabatch.config.run import RunConfig
from megabatch.data.cache import stored_numbers
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.reference_log_probs import log_probs_file
from megabatch.data.run_caches import schedule_of
from megabatch.data.tokens.chunk import Names
from megabatch.errors import DataError
from megabatch.trainer.data.batches import Batches
from megabatch.trainer.data.dataset import Tokens, Validation, ahead_of, open_tokens, padded_share, steps_of
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.engine import POLICY, Engine
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.objective import REFERENCE, Compared, Objective
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Step, Steps
from megabatch.trainer.tasks.reference import reference_model

logger = logging.getLogger(__name__)

_PLACE = "place"
"""The name column by which a pack says which samples it holds."""


class _Objective(Objective, Compared, Protocol):
    """A loss that compares log-probabilities."""


def open_compared(
    run: RunConfig,
    source: ModelSource,
    ranks: Ranks,
    objective: _Objective,
    *,
    busy: Callable[[], None],
    note: Callable[[TokenCache], None] = lambda data: None,
) -> tuple[Steps, Validation | None]:
    """Steps and evaluation of a task with a reference: a dataset or a stream; collective.

    Args: busy: called from time to time; note: called with the training data of a dataset. Raises: MegabatchError.
    """
    if run.recipe.data.streaming:
        return open_stream(run, source, ranks, objective, busy=busy)
    tokens = open_tokens(run, source, ranks, busy=busy)
    note(tokens.train)
    if run.recipe.rlhf.precompute_ref_log_probs:
        tokens = with_reference(run, source, ranks, tokens, objective, busy=busy)
    return steps_of(run, ranks, tokens, objective)


def with_reference(
    run: RunConfig,
    source: ModelSource,
    ranks: Ranks,
    tokens: Tokens,
    objective: Compared,
    *,
    busy: Callable[[], None],
) -> Tokens:
    """The data with the reference's log-probability of each sample as the column `REFERENCE`; collective.

    The reference is built, at the run's layout, only if a part's numbers are not stored yet, and is gone afterwards.
    Args: busy: called from time to time. Raises: MegabatchError on every rank.
    """
    evaluates = run.recipe.evaluation.eval_iters != 0
    parts = [tokens.train, *([tokens.validation] if tokens.validation is not None and evaluates else [])]
    if _are_given(parts):
        logger.info("the reference's log-probabilities are those of the data; no reference is loaded")
        return tokens
    files = ranks.on_main(lambda: [log_probs_file(run, part, busy=busy) for part in parts])
    found = ranks.on_main(lambda: [_is_there(file, part) for file, part in zip(files, parts, strict=True)])
    missing = [(part, file) for part, file, there in zip(parts, files, found, strict=True) if not there]
    if missing:
        engine = Engine(reference_model(run, source, ranks), ranks)
        for part, file in missing:
            _store(file, _computed(run, ranks, engine, part, objective, busy=busy), part, ranks)
        del engine
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    train, *validation = [_with_stored(part, file) for part, file in zip(parts, files, strict=True)]
    logger.info("the reference's log-probabilities are stored in %s; it is not in memory", files[0].parent)
    return replace(tokens, train=train, validation=validation[0] if validation else tokens.validation)


def _are_given(parts: Sequence[TokenCache]) -> bool:
    """Whether the rows have them. Raises: DataError where some rows do and others do not."""
    if any(REFERENCE not in part.columns for part in parts):
        return False
    lacking = [np.flatnonzero(np.isnan(part.columns[REFERENCE])) for part in parts]
    if all(len(some) == len(part) for some, part in zip(lacking, parts, strict=True)):
        return False
    for some, part in zip(lacking, parts, strict=True):
        if len(some):
            raise DataError(
                f"{part.origin(int(some[0]))}: has no ref_chosen_logps and ref_rejected_logps, as other rows do; give "
                "them in every row, or in none"
            )
    return True


def _is_there(file: Path, part: TokenCache) -> bool:
    return stored_numbers.read(file, count=len(part)) is not None


def _with_stored(part: TokenCache, file: Path) -> TokenCache:
    values = stored_numbers.read(file, count=len(part))
    if values is None:
        raise DataError(f"{file} was written a moment ago and is not there on this node; the cache must be shared")
    return replace(part, columns={**part.columns, REFERENCE: values})


def _computed(
    run: RunConfig,
    ranks: Ranks,
    engine: Engine,
    part: TokenCache,
    objective: Compared,
    *,
    busy: Callable[[], None],
) -> np.ndarray:
    """float32, one value for each sample, the same on every rank."""
    values = torch.zeros(len(part), device=ranks.device)
    logger.info("computing the reference's log-probabilities of %s samples", f"{len(part):,}")
    for step in _passes(run, ranks, part):
        for pack, logps in zip(step.packs, objective.log_probs(step.packs, engine, model=POLICY), strict=True):
            values[pack.columns[_PLACE].to(values.device)] = logps
        busy()
    return np.asarray(engine.total(values).cpu().numpy())


def _passes(run: RunConfig, ranks: Ranks, part: TokenCache) -> Iterator[Step]:
    """This rank's share of all samples, each once."""
    placed = replace(part, names={**part.names, _PLACE: Names((), np.arange(len(part)))})
    if (size := run.recipe.rlhf.precompute_ref_batch_size) is not None:
        batch = replace(run.recipe.batch, micro_batch_size=size)
        run = replace(run, recipe=replace(run.recipe, batch=batch))
    schedule = schedule_of(run, placed, shuffle=False)
    share = padded_share(run, ranks, placed, schedule)
    return Batches(placed, schedule, share=share, ahead=ahead_of(run, ranks)).evaluate()


def _store(file: Path, values: np.ndarray, part: TokenCache, ranks: Ranks) -> None:
    def store() -> None:
        if len(faulty := np.flatnonzero(~np.isfinite(values))):
            raise DataError(
                f"{part.origin(int(faulty[0]))}: the reference's log-probability is {values[faulty[0]]}, as are "
                f"{len(faulty) - 1} others; check its weights and torch_dtype"
            )
        stored_numbers.write(file, values)

    ranks.on_main(store)
