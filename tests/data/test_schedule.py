from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.schedule import Cursor, Interleaving, Schedule, cost, deal, sorted_in_windows
from megabatch.errors import DataError

LENGTHS = np.random.default_rng(0).integers(3, 60, 50)


def draw(schedule: Schedule, cursor: Cursor, steps: int) -> tuple[list[list[int]], list[Cursor]]:
    batches, cursors = [], []
    for _ in range(steps):
        items, cursor = schedule.next(cursor)
        batches.append(items.tolist())
        cursors.append(cursor)
    return batches, cursors


@given(
    size=st.integers(1, 80),
    batch=st.integers(1, 16),
    shuffle=st.tuples(st.booleans(), st.booleans()),
    packing=st.sampled_from([None, 64]),
    epochs=st.integers(1, 4),
    stop=st.integers(0, 320),
    by_length=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_each_epoch_draws_each_sample_once_and_resumes_exactly(
    size: int, batch: int, shuffle: tuple[bool, bool], packing: int | None, epochs: int, stop: int, by_length: bool
) -> None:
    lengths = np.random.default_rng(size).integers(1, 60, size)

    def schedule() -> Schedule:
        return Schedule(lengths, global_batch_size=batch, seed=3, dataset_shuffle=shuffle[0],
                        train_dataloader_shuffle=shuffle[1], packing_length=packing,
                        group_by_length=by_length)  # fmt: skip

    whole = schedule()
    if batch > len(whole):
        with pytest.raises(DataError, match="global_batch_size"):
            whole.train_iters(epochs)
        return
    steps = whole.train_iters(epochs)
    assert steps == len(whole) * epochs // batch
    batches, cursors = draw(whole, Cursor(), steps + 3)
    assert {len(items) for items in batches} == {batch}
    drawn = [item for items in batches for item in items]
    for epoch in range(epochs):
        part = drawn[epoch * len(whole) : (epoch + 1) * len(whole)]
        samples = np.concatenate([whole.packs[item] for item in part])
        assert len(part) == len(set(part))
        assert len(samples) == len(set(samples.tolist()))
        if len(part) == len(whole):
            assert sorted(samples.tolist()) == list(range(size))
    assert len(drawn[: steps * batch]) > epochs * len(whole) - batch, "less than a batch is left of the last epoch"
    assert [cursor.epoch * len(whole) + cursor.offset for cursor in cursors] == [
        batch * (number + 1) for number in range(len(cursors))
    ]
    stop = stop % len(batches)
    saved = Cursor.from_json(json.loads(json.dumps(([Cursor(), *cursors])[stop].to_json())))
    assert draw(schedule(), saved, len(batches) - stop) == (batches[stop:], cursors[stop:])


def test_batches_run_on_over_the_end_of_an_epoch_by_hand() -> None:
    """7 samples in batches of 3, unshuffled, 3 epochs: 21 // 3 = 7 steps, each sample three times."""
    schedule = Schedule(np.full(7, 5), global_batch_size=3, dataset_shuffle=False, train_dataloader_shuffle=False)
    assert schedule.train_iters(3) == 7
    batches, cursors = draw(schedule, Cursor(), 7)
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4], [5, 6, 0], [1, 2, 3], [4, 5, 6]]
    assert [(cursor.epoch, cursor.offset) for cursor in cursors] == [
        (0, 3), (0, 6), (1, 2), (1, 5), (2, 1), (2, 4), (2, 7)]  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"), [(1000, 3, 512, 5), (1000, 1, 512, 1), (1024, 3, 512, 6), (7, 2, 7, 2)]
)
def test_steps_are_counted_over_all_epochs(samples: int, epochs: int, batch: int, steps: int) -> None:
    schedule = Schedule(np.full(samples, 5), global_batch_size=batch)
    assert schedule.train_iters(epochs) == steps
    drawn = [item for items in draw(schedule, Cursor(), steps)[0] for item in items]
    assert len(set(drawn)) == min(samples, steps * batch)


def test_shuffling() -> None:
    def first_epochs(dataset: bool, loader: bool, seed: int = 1) -> list[list[list[int]]]:
        schedule = Schedule(
            LENGTHS, global_batch_size=5, seed=seed, dataset_shuffle=dataset, train_dataloader_shuffle=loader
        )
        batches, _ = draw(schedule, Cursor(), 20)
        samples = [[int(schedule.packs[item][0]) for item in items] for items in batches]
        return [samples[:10], samples[10:]]

    file_order = [list(range(start, start + 5)) for start in range(0, 50, 5)]
    assert first_epochs(False, False) == [file_order, file_order]
    once = first_epochs(True, False)
    assert once[0] == once[1] != file_order
    each = first_epochs(False, True)
    assert each[0] != each[1]
    assert first_epochs(True, True) == first_epochs(True, True) != first_epochs(True, True, seed=2)


def test_a_shuffled_epoch_is_pinned() -> None:
    """A change of the generator would silently give resumed runs other batches: this must never change."""
    schedule = Schedule(np.full(8, 5), global_batch_size=4, seed=42)
    samples = [int(schedule.packs[int(item)][0]) for item in schedule.next(Cursor())[0]]
    assert samples == [2, 5, 0, 1]


def test_a_larger_batch_goes_on_from_the_cursor() -> None:
    small, large = (Schedule(LENGTHS, global_batch_size=size) for size in (5, 10))
    batches, cursors = draw(small, Cursor(), 4)
    assert draw(large, cursors[1], 1)[0] == [batches[2] + batches[3]]


def test_train_iters_and_too_little_data() -> None:
    assert Schedule(LENGTHS, global_batch_size=8).train_iters(3) == 18  # 150 // 8
    with pytest.raises(DataError, match=r"global_batch_size=64 is more than the 50 samples of .*lower it to 50"):
        Schedule(LENGTHS, global_batch_size=64).train_iters(2)
    with pytest.raises(DataError, match="global_batch_size=64"):
        Schedule(LENGTHS, global_batch_size=64).next(Cursor())


@pytest.mark.parametrize("other", [{"seed": 1}, {"packing_length": 64}, {"dataset_shuffle": False}])
def test_a_cursor_of_other_data_is_refused(other: dict[str, int]) -> None:
    _, cursor = Schedule(LENGTHS, global_batch_size=5).next(Cursor())
    with pytest.raises(DataError, match="belongs to other samples, seed, shuffling or packing"):
        Schedule(LENGTHS, global_batch_size=5, **other).next(cursor)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data cursor .* cannot be read"):
        Cursor.from_json({"epoch": "x"})


def test_a_cursor_of_edited_data_is_refused() -> None:
    _, cursor = Schedule(LENGTHS, global_batch_size=5, content="aa").next(Cursor())
    Schedule(LENGTHS, global_batch_size=5, content="aa").next(cursor)
    with pytest.raises(DataError, match="other tokens than when the checkpoint was written"):
        Schedule(LENGTHS, global_batch_size=5, content="bb").next(cursor)


def test_a_cursor_from_before_contents_were_compared_goes_on() -> None:
    """Its form is that of checkpoints written then: order and lengths alone."""
    schedule = Schedule(LENGTHS, global_batch_size=8, content="aa")
    old = Cursor(0, 48, schedule.fingerprint.partition(":")[0])
    assert not old.knows_content
    items, cursor = schedule.next(old)
    assert items.tolist() == [*schedule.order(0)[48:], *schedule.order(1)[:6]]
    assert cursor.knows_content
    assert Cursor().knows_content
    with pytest.raises(DataError, match="belongs to other samples"):
        schedule.next(Cursor(0, 48, "0123456789abcdef"))


def test_the_order_part_of_a_fingerprint_is_pinned() -> None:
    """Or checkpoints written before could not be resumed."""
    schedule = Schedule(np.array([3, 5, 7]), global_batch_size=1, seed=42, packing_length=8)
    assert schedule.fingerprint == "b96427cfa183937b:"


def test_the_longest_pack_by_hand() -> None:
    """Of samples that count more than they did when they were packed; items count whole."""
    packed = Schedule(np.array([3, 5, 7]), global_batch_size=1, packing_length=8)
    assert packed.longest(np.array([4, 8, 8])) == 12
    assert Schedule(np.array([3, 5, 7]), global_batch_size=1).longest(np.array([4, 8, 8])) == 8
    pairs = Schedule(np.array([3, 5, 7, 1]), items=np.array([0, 2, 4]), global_batch_size=1)
    assert pairs.longest(np.array([4, 8, 8, 2])) == 12


def test_evaluation_holds_every_item_once() -> None:
    batches = [items.tolist() for items in Schedule(LENGTHS, global_batch_size=8).once()]
    assert [item for items in batches for item in items] == list(range(50))
    assert [len(items) for items in batches] == [8] * 6 + [2]


@given(
    costs=st.lists(st.floats(1, 1000), min_size=0, max_size=70),
    dp=st.integers(1, 5),
    micro=st.integers(1, 4),
    stages=st.integers(1, 3),
    longer=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_every_position_is_dealt_once_in_equal_counts(
    costs: list[float], dp: int, micro: int, stages: int, longer: int
) -> None:
    interleaving = Interleaving(stages, stages + longer)
    dealt = deal(np.array(costs), dp_size=dp, micro_batch_size=micro, interleaving=interleaving)
    assert sorted(place for rank in dealt for row in rank for place in row) == list(range(len(costs)))
    assert len(dealt) == dp
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) == interleaving.rounds(-(-len(costs) // (dp * micro))) >= 1
    assert max(len(row) for rank in dealt for row in rank) <= micro


@pytest.mark.parametrize(
    ("stages", "group", "needed", "rounds"),
    [(1, 1, 0, 1), (1, 1, 5, 5), (2, 2, 1, 2), (2, 2, 5, 6), (2, 3, 5, 5), (2, 3, 4, 5), (2, 3, 1, 3), (3, 4, 7, 7),
     (3, 4, 8, 8), (3, 4, 9, 11), (2, 6, 1, 6)],
)  # fmt: skip
def test_micro_batches_of_an_interleaved_pipeline_by_hand(stages: int, group: int, needed: int, rounds: int) -> None:
    """(3, 4): 9 leave one micro-batch behind two groups of four, and three stages want three: 11."""
    assert Interleaving(stages, group).rounds(needed) == rounds


@given(stages=st.integers(1, 5), longer=st.integers(0, 5), needed=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_no_smaller_number_of_micro_batches_would_do(stages: int, longer: int, needed: int) -> None:
    group = stages + longer

    def is_taken(count: int) -> bool:  # both conditions as megatron-core's schedule raises on them
        return group <= count and not 0 < count % group < stages

    assert Interleaving(stages, group).rounds(needed) == next(n for n in range(needed, 200) if is_taken(n))


def test_ranks_are_balanced() -> None:
    costs = np.random.default_rng(0).gamma(3, 70, 256)  # a tail of long answers
    for dp in (2, 4, 8):
        dealt = deal(costs, dp_size=dp, micro_batch_size=2)
        loads = [sum(costs[place] for row in rank for place in row) for rank in dealt]
        assert max(loads) / np.mean(loads) < 1.02
        firsts = [sum(costs[place] for place in rank[0]) for rank in dealt]
        assert all(sum(costs[a]) >= sum(costs[b]) for rank in dealt for a, b in pairwise(rank)), "costliest first"
        assert max(firsts) == max(sum(costs[row]) for rank in dealt for row in rank)


def test_cost_by_hand() -> None:
    assert cost(np.array([12, 24]), hidden_size=2) == 12 + 6 + 24 + 24


def test_grouped_batches_hold_similar_lengths_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 1000)
    spreads = {}
    for by_length in (False, True):
        schedule = Schedule(lengths, global_batch_size=8, group_by_length=by_length)
        batches, _ = draw(schedule, Cursor(), 250)
        sizes = [[int(lengths[schedule.samples(pack)[0]]) for pack in packs] for packs in batches]
        spreads[by_length] = np.mean([max(some) - min(some) for some in sizes])
        assert len({tuple(packs) for packs in batches}) == 250
        if by_length:
            assert sizes[0][0] == max(lengths) == max(map(max, sizes))
    assert spreads[True] < spreads[False] / 10


def test_windows_are_sorted_falling_and_rising_from_the_longest() -> None:
    lengths = np.array([5, 1, 4, 2, 9, 3, 7, 8, 6, 10])
    order = sorted_in_windows(np.arange(9), lengths, window=3)
    assert lengths[order].tolist() == [9, 3, 2, 1, 4, 5, 8, 7, 6]
    assert sorted_in_windows(np.arange(10), lengths, window=4).tolist()[:2] == [9, 8]


def test_an_order_by_length_belongs_to_its_batch_size() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 1000)
    _, cursor = Schedule(lengths, global_batch_size=8, group_by_length=True).next(Cursor())
    for other in ({"global_batch_size": 16, "group_by_length": True}, {"global_batch_size": 8}):
        with pytest.raises(DataError, match="belongs to other samples, seed, shuffling"):
            Schedule(lengths, **other).require_own(cursor)  # type: ignore[arg-type]
