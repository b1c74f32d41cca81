from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.sources import resolve
from megabatch.data.schedule import Cursor, Interleaving, Schedule
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError
from megabatch.trainer.data.batches import Ahead, Batches, Maker, Share, made_ahead
from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.pack import Pack
from megabatch.trainer.steps import Step


@pytest.fixture(scope="module")
def cache(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("batches")
    path = folder / "a.csv"
    lines = [f"What is {index}?,{'apple ' * (index * 7 % 13 + 1)}" for index in range(50)]
    path.write_text("\n".join(["query,response", *lines]))
    built = TokenCache.build(resolve([str(path)]), Encoding(tokenizer=tokenizer_folder), cache_dir=folder / "cache")
    return TokenCache.open(built)


def lines_of(packs: list[Pack]) -> list[int]:
    return [line for pack in packs if pack.sequences for line in pack.columns["number"].tolist()]


def steps(
    cache: TokenCache,
    count: int,
    *,
    cursor: Mapping[str, Any] | None = None,
    packing: int | None = None,
    ahead: int = 0,
    **share: int,
) -> list[list[Step]]:
    """[rank][step]"""
    dp = share.get("dp_size", 1)
    schedule = Schedule(cache.lengths, global_batch_size=8, packing_length=packing)
    how = Ahead(workers=ahead, each=2)
    ranks = [Batches(cache, schedule, share=Share(dp_rank=rank, **share), ahead=how) for rank in range(dp)]
    return [list(islice(rank.train(Cursor.from_json(cursor or {})), count)) for rank in ranks]


@pytest.mark.parametrize("packing", [None, 64])
def test_the_global_batch_is_the_same_for_every_split(cache: TokenCache, packing: int | None) -> None:
    (reference,) = steps(cache, 9, packing=packing)
    for share in (
        {"dp_size": 2},
        {"dp_size": 4, "micro_batch_size": 2},
        {"micro_batch_size": 8, "row_multiple": 16},
        {"micro_batch_size": 2, "row_multiple": 8, "sequence_multiple": 4},
    ):
        ranks = steps(cache, 9, packing=packing, **share)
        for number, expected in enumerate(reference):
            parts = [rank[number] for rank in ranks]
            assert sorted(line for part in parts for line in lines_of(part.packs)) == sorted(lines_of(expected.packs))
            total = sum(float(pack.weights_T.sum()) for part in parts for pack in part.packs)
            for part in parts:
                assert (part.totals, part.tokens, part.samples, part.cursor, part.epoch) == (
                    expected.totals, expected.tokens, expected.samples, expected.cursor, expected.epoch)  # fmt: skip
                assert part.totals[Norm.TOKENS] == total
                assert part.filled == sum(len(part.packs) for part in parts)
                assert len(part.packs) == 8 // (share.get("dp_size", 1) * share.get("micro_batch_size", 1))
                assert all(len(pack.ids_T) % share.get("row_multiple", 1) == 0 for pack in part.packs)


def test_resuming_at_another_size_draws_the_batches_that_would_have_come(cache: TokenCache) -> None:
    (whole,) = steps(cache, 10)
    ranks = steps(cache, 6, cursor=whole[3].cursor, dp_size=2, micro_batch_size=2)
    for number in range(6):
        drawn = sorted(line for rank in ranks for line in lines_of(rank[number].packs))
        assert drawn == sorted(lines_of(whole[4 + number].packs))


@pytest.mark.parametrize(("dp", "micro", "stages"), [(1, 1, 1), (2, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("packing", [None, 64])
def test_evaluation_covers_every_sample_once(
    cache: TokenCache, dp: int, micro: int, stages: int, packing: int | None
) -> None:
    schedule = Schedule(cache.lengths, global_batch_size=12, packing_length=packing)
    split: dict[str, Any] = {"dp_size": dp, "micro_batch_size": micro, "interleaving": Interleaving(stages, stages)}
    shares = [Share(dp_rank=rank, **split) for rank in range(dp)]
    ranks = [list(Batches(cache, schedule, share=share).evaluate()) for share in shares]
    everything = [line for rank in ranks for step in rank for line in lines_of(step.packs)]
    assert sorted(everything) == sorted(cache.origins[:, 1].tolist())
    for parts in zip(*ranks, strict=True):
        assert len({len(part.packs) for part in parts}) == 1
        assert len(parts[0].packs) % stages == 0
        filled = sum(pack.sequences > 0 for part in parts for pack in part.packs)
        assert {part.filled for part in parts} == {filled}
    assert sum(step.totals[Norm.TOKENS] for step in ranks[0]) == cache.sums.sum()
    assert sum(step.samples for step in ranks[0]) == 50


@pytest.mark.parametrize("packing", [None, 200])
def test_items_stay_whole_on_a_rank_and_are_counted(cache: TokenCache, packing: int | None) -> None:
    """Samples in groups of five, dealt to three ranks: a group's lie side by side in one micro-batch."""
    grouped = replace(cache, items=np.arange(0, 51, 5))
    schedule = Schedule(cache.lengths, items=grouped.items, global_batch_size=2, packing_length=packing)
    ranks = [Batches(grouped, schedule, share=Share(dp_rank=rank, dp_size=3)) for rank in range(3)]
    for parts in zip(*(list(islice(rank.train(Cursor()), 4)) for rank in ranks), strict=True):
        packs = [pack for part in parts for pack in part.packs]
        assert parts[0].totals[Norm.SEQUENCES] == sum(pack.sequences for pack in packs) == parts[0].samples
        found = [pack.columns["number"][pack.items_N == n] for pack in packs for n in pack.items_N.unique()]
        assert parts[0].totals[Norm.ITEMS] == len(found) >= 2
        for lines in found:  # of the file, whose first is 2
            assert lines.tolist() == list(range(int(lines[0]), int(lines[0]) + 5))
            assert (int(lines[0]) - 2) % 5 == 0


def test_eval_iters_limits_the_batches(cache: TokenCache) -> None:
    batches = Batches(cache, Schedule(cache.lengths, global_batch_size=8), share=Share())
    assert [len(list(batches.evaluate(eval_iters=count))) for count in (0, 2, 99, -1)] == [0, 2, 7, 7]


def test_working_ahead_changes_nothing_and_ends_with_its_consumer(cache: TokenCache) -> None:
    (plain,), (early,) = steps(cache, 9), steps(cache, 9, ahead=3)
    assert [lines_of(step.packs) for step in early] == [lines_of(step.packs) for step in plain]
    assert [step.cursor for step in early] == [step.cursor for step in plain]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megabatch-batches")]


def test_steps_keep_their_order_whichever_is_ready_first() -> None:
    """The first step waits until a later one is made."""
    later = threading.Event()

    def makers() -> Iterator[Any]:
        yield lambda: int(not later.wait(60))
        yield lambda: later.set() or 1
        yield from (partial(int, number) for number in range(2, 9))

    assert list(made_ahead(makers(), Ahead(workers=2))) == list(range(9))


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("where", ["schedule", "worker"])
def test_an_error_arrives_in_its_place(workers: int, where: str) -> None:
    def fail() -> Step:
        raise DataError("disk gone")

    def failing() -> Iterator[Maker]:
        yield lambda: 1  # type: ignore[return-value]
        if where == "schedule":
            fail()
        yield fail

    stream = made_ahead(failing(), Ahead(workers=workers))
    assert next(stream) == 1
    with pytest.raises(DataError, match="disk gone"):
        next(stream)


def test_a_stream_dropped_at_exit_says_nothing() -> None:
    """One that is still held when the interpreter takes its modules apart."""
    program = (
        "import itertools, threading\n"
        "from megabatch.trainer.data.batches import Ahead, made_ahead\n"
        "stream = made_ahead((lambda: 1 for _ in itertools.count()), Ahead(workers=2))\n"
        "next(stream)\n"
        "threading.held = stream\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_rows_of_a_round_are_equally_long_over_neighbours(cache: TokenCache) -> None:
    """Pairs of four ranks: each pair's rows are as long as its longer one, and hold the same samples as ever."""
    split = {"dp_size": 4, "row_multiple": 3}
    plain, padded = (steps(cache, 3, **split, equal_rows=equal) for equal in (1, 2))
    differed = False
    for first in (0, 2):
        for number in range(3):
            before = [[len(pack.ids_T) for pack in plain[rank][number].packs] for rank in (first, first + 1)]
            after = [[len(pack.ids_T) for pack in padded[rank][number].packs] for rank in (first, first + 1)]
            assert after[0] == after[1] == [max(pair) for pair in zip(*before, strict=True)]
            differed |= before[0] != before[1]
    assert differed
    for rank in range(4):
        for one, other in zip(plain[rank], padded[rank], strict=True):
            assert lines_of(one.packs) == lines_of(other.packs)


def test_rows_are_padded_to_the_runs_longest(cache: TokenCache) -> None:
    """Same samples, weights and totals; every row of every rank as long as asked for."""
    split = {"dp_size": 2, "micro_batch_size": 2}
    longest = 2 * int(cache.lengths.max())
    plain, padded = (steps(cache, 3, **split, row_length=length) for length in (0, longest))
    for rank in range(2):
        for one, other in zip(plain[rank], padded[rank], strict=True):
            assert {len(pack.ids_T) for pack in other.packs} == {longest}
            assert lines_of(one.packs) == lines_of(other.packs)
            assert (one.totals, one.tokens, one.samples) == (other.totals, other.tokens, other.samples)
            assert sum(float(pack.weights_T.sum()) for pack in other.packs) == pytest.approx(
                sum(float(pack.weights_T.sum()) for pack in one.packs)
            )
