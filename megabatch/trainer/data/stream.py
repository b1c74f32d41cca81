"""Steps that draw from a stream: one rank reads, tokenises and packs, and every step is sent to all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.files import Origin
from megabatch.data.run_caches import build_validation, cache_folder, stream_of
from megabatch.data.stream import Drawn, Place, Stream
from megabatch.errors import DataError
from megabatch.trainer.data.batches import Ahead
from megabatch.trainer.data.dataset import Validation, ahead_of, share_of, validation_of
from megabatch.trainer.data.global_batch import GlobalBatch, Share
from megabatch.trainer.engine import Engine
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.objective import Objective
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import State, Step, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed(Steps):
    """A run's training data as steps, read while it trains."""

    stream: Stream
    fingerprint: str
    ranks: Ranks
    share: Share
    ahead: Ahead
    train_iters: int
    files: dict[tuple[str, bool], int] = field(default_factory=dict)
    """File and `is_line` of the origins seen so far → number; the same on every rank."""

    @property
    def course(self) -> str:  # type: ignore[override]
        batch, rows = self.stream.global_batch_size, self.stream.rows
        return f"a stream in batches of {batch:,}, shuffled and packed within blocks of {rows:,} rows"

    def require(self, cursor: State) -> None:
        data = Place.from_json(cursor).data
        if data and data != self.fingerprint:
            raise DataError(
                "the checkpoint's place in the stream belongs to other files, tokens, seed, shuffling, "
                "shuffle_buffer_size or packing than this run's; resume with those of the run that wrote it, or start "
                "over with checkpoint.finetune=True"
            )

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        place = replace(Place.from_json(cursor), data=self.fingerprint)
        depth = self.ahead.workers and self.ahead.each
        mine = prepared(self.stream.batches(place), depth) if self.ranks.is_main else iter(())
        while True:
            step = self._step(self.ranks.on_main(lambda: next(mine)))
            yield replace(step, packs=[pack.pinned() for pack in step.packs]) if self.ahead.pinned else step

    def places(self, pack: Pack) -> Sequence[str]:
        files = list(self.files)
        origins = zip(pack.columns["source"].tolist(), pack.columns["number"].tolist(), strict=True)
        return [str(Origin(files[source][0], number, files[source][1])) for source, number in origins]

    def _step(self, drawn: Drawn) -> Step:
        """This rank's share of a batch, whose packs hold items that lie side by side."""
        bounds = drawn.samples.items
        ends = np.cumsum(drawn.packs)
        spans = [range(end - count, end) for end, count in zip(ends.tolist(), drawn.packs, strict=True)]
        sizes = np.diff(bounds)
        batch = GlobalBatch(
            self._with_files_of_the_run(drawn.samples),
            [np.arange(bounds[span.start], bounds[span.stop]) for span in spans],
            [np.repeat(np.arange(len(span)), sizes[span.start : span.stop]) for span in spans],
        )
        return batch.step(self.share, cursor=drawn.place.to_json(), epoch=float(drawn.place.epoch))

    def _with_files_of_the_run(self, samples: TokenCache) -> TokenCache:
        """The samples with files numbered over all batches, of which each brings a list of its own."""
        known = [(str(file), bool(is_line)) for file, is_line in samples.meta["sources"]]
        numbers: np.ndarray = np.array([self.files.setdefault(file, len(self.files)) for file in known], np.int32)
        origins = np.stack([numbers[samples.origins[:, 0]], samples.origins[:, 1]], axis=1)
        return replace(samples, origins=origins)


def open_stream(
    run: RunConfig, source: ModelSource, ranks: Ranks, objective: Objective, *, busy: Callable[[], None]
) -> tuple[Streamed, Validation | None]:
    """The training data as a stream, and the evaluation, whose data is tokenised now; collective.

    Args: `busy` is called whenever some hundred rows are tokenised. Raises: DataError.
    """
    validation = ranks.on_main(lambda: build_validation(run, source.tokenizer, on_chunk=busy))
    stream = ranks.on_main(lambda: stream_of(run, source.tokenizer))
    steps = Streamed(
        stream=stream,
        fingerprint=ranks.on_main(lambda: stream.fingerprint(cache_folder(run))),
        ranks=ranks,
        share=share_of(run, ranks),
        ahead=ahead_of(run, ranks),
        train_iters=resolved(run.recipe.training.train_iters),
    )
    return steps, validation_of(run, ranks, None if validation is None else TokenCache.open(validation), objective)


def prepared(batches: Iterator[Drawn], depth: int) -> Iterator[Drawn]:
    """The same batches; a thread prepares `depth` of them ahead. 0 makes each on demand."""
    if not depth:
        yield from batches
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="megabatch-stream")
    waiting: deque[Future[Drawn]] = deque()
    try:
        while True:
            while len(waiting) <= depth:
                waiting.append(pool.submit(next, batches))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
