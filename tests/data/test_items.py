"""Samples that belong together, and columns of samples and tokens, from a cache to the order of packs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.cache import cache_files
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.packing import samples_of
from megabatch.data.rows.files import Origin
from megabatch.data.schedule import Cursor, Schedule
from megabatch.data.tokens.chunk import Chunk
from megabatch.data.tokens.sample import Encoded
from megabatch.errors import DataError

SIZES = [2, 1, 3, 2, 2, 1, 2, 3, 2, 2]


def encoded(number: int) -> Encoded:
    """A sample whose every number can be told from its own."""
    length = number % 5 + 2
    ids = np.full(length, number, np.int32)
    weights = np.ones(length, np.float32)
    weights[:1] = 0
    top = np.arange(2 * length, dtype=np.int32).reshape(length, 2) + 100 * number
    return Encoded(ids, weights, {"label": number / 2}, {"logps": -ids / np.float32(7), "top": top})


def chunks() -> list[Chunk]:
    made, number = [], 0
    for rows in (SIZES[:4], SIZES[4:]):
        chunk = Chunk()
        for size in rows:
            chunk.add([encoded(number + one) for one in range(size)], Origin("a.jsonl", number + 1))
            number += size
        made.append(chunk)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    path = tmp_path_factory.mktemp("items") / "cache"
    cache_files.write(path, [chunk.arrays() for chunk in chunks()])
    return TokenCache.open(path)


def same(cache: TokenCache, index: int, number: int) -> None:
    sample, expected = cache[index], encoded(number)
    assert sample.ids.tolist() == expected.ids.tolist()
    assert sample.columns["label"] == expected.columns["label"]
    assert sample.token_columns.keys() == {"logps", "top"}
    for name, values in expected.token_columns.items():
        assert sample.token_columns[name].dtype == values.dtype
        assert sample.token_columns[name].tolist() == values.tolist()


def test_a_cache_gives_back_items_and_columns(cache: TokenCache) -> None:
    assert np.diff(cache.items).tolist() == SIZES
    for number in range(sum(SIZES)):
        same(cache, number, number)
    assert {name: values.shape for name, values in cache.blank.token_columns.items()} == {"logps": (0,), "top": (0, 2)}
    assert dict(cache.blank.columns) == {"source": 0, "number": 0, "label": 0.0}


def test_names_are_numbered_over_all_chunks_and_are_no_content(cache: TokenCache, tmp_path: Path) -> None:
    made = chunks()
    named = [sample for chunk in made for sample in chunk.samples]
    channels = [("code", "math", "None")[index % 3] if index < 9 else "prose" for index in range(len(named))]
    names = iter(channels)
    for chunk in made:
        chunk.samples[:] = [sample._replace(names={"channel": next(names)}) for sample in chunk.samples]
    cache_files.write(tmp_path / "named", [chunk.arrays() for chunk in made])
    found = TokenCache.open(tmp_path / "named")
    assert found.content == cache.content, "where a loss is counted decides nothing that is learned"
    both = ["None", "code", "left", "math", "prose"]
    for one, known in ((found, ["code", "math", "None", "prose"]), (found.numbered("channel", both), both)):
        assert list(one.names["channel"].names) == known
        assert [known[one[index].columns["channel"]] for index in range(len(one))] == channels
        part = one.subset(np.array([9, 0]))
        chosen = [*range(18, 20), 0, 1]
        assert [known[part[index].columns["channel"]] for index in range(4)] == [channels[index] for index in chosen]
        assert one.blank.columns["channel"] == 0


def test_a_changed_column_is_another_content(cache: TokenCache, tmp_path: Path) -> None:
    made = chunks()
    made[1].samples[-1] = made[1].samples[-1]._replace(columns={"label": -1.0})
    cache_files.write(tmp_path / "label", [chunk.arrays() for chunk in made])
    made = chunks()
    made[0].items[:3] = [1, 2, 3]
    cache_files.write(tmp_path / "items", [chunk.arrays() for chunk in made])
    contents = [TokenCache.open(tmp_path / name).content for name in ("label", "items")]
    assert len({cache.content, *contents}) == 3


def test_samples_without_a_column_that_others_have_are_refused(tmp_path: Path) -> None:
    made = chunks()
    made[1].samples[:] = [sample._replace(columns={}) for sample in made[1].samples]
    with pytest.raises(AssertionError, match="same columns"):
        cache_files.write(tmp_path / "cache", [chunk.arrays() for chunk in made])
    assert not list(tmp_path.iterdir())


def test_a_split_takes_whole_items(cache: TokenCache) -> None:
    train, validation = cache.split(0.3, seed=1)
    assert (len(train.items) - 1, len(validation.items) - 1) == (7, 3)
    firsts = np.cumsum([0, *SIZES])
    for part in (train, validation):
        for start, stop in pairwise(part.items.tolist()):
            number = int(part[start].ids[0])
            assert number in firsts
            assert stop - start == SIZES[firsts.tolist().index(number)]
            for offset in range(stop - start):
                same(part, start + offset, number + offset)
    again = train.subset(np.array([2, 0]))
    assert np.diff(again.items).tolist() == [np.diff(train.items)[2], np.diff(train.items)[0]]
    same(again, 0, int(train[int(train.items[2])].ids[0]))


def test_samples_of_items_by_hand() -> None:
    bounds = np.array([0, 2, 3, 6])
    assert samples_of(np.array([2, 0]), bounds).tolist() == [3, 4, 5, 0, 1]
    assert samples_of(np.array([], np.int64), bounds).tolist() == []


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    packing=st.sampled_from([None, 80]),
    shuffle=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_items_stay_whole_in_every_pack(sizes: list[int], packing: int | None, shuffle: bool) -> None:
    bounds = np.cumsum([0, *sizes])
    lengths = np.random.default_rng(len(sizes)).integers(1, 20, bounds[-1])
    schedule = Schedule(lengths, items=bounds, global_batch_size=1, dataset_shuffle=shuffle, packing_length=packing)
    drawn = []
    for pack in range(len(schedule)):
        samples, items = schedule.samples(pack), schedule.items(pack)
        assert len(samples) == len(items)
        assert packing is None or lengths[samples].sum() <= packing
        for item in range(int(items[-1]) + 1):
            its = samples[items == item].tolist()
            number = int(np.searchsorted(bounds, its[0], side="right")) - 1
            assert its == list(range(bounds[number], bounds[number + 1]))
            drawn.append(number)
        assert packing is not None or items.max() == 0
    assert sorted(drawn) == list(range(len(sizes)))
    if max(sizes) > 1:
        alone = Schedule(lengths, global_batch_size=1, dataset_shuffle=shuffle, packing_length=packing)
        assert alone.fingerprint != schedule.fingerprint


def test_a_cursor_of_other_items_is_refused() -> None:
    lengths = np.full(6, 3)
    _, cursor = Schedule(lengths, items=np.array([0, 2, 4, 6]), global_batch_size=2).next(Cursor())
    with pytest.raises(DataError, match="other samples, seed, shuffling or packing"):
        Schedule(lengths, items=np.array([0, 3, 6]), global_batch_size=2).require_own(cursor)


def test_an_item_beyond_the_pack_is_named() -> None:
    with pytest.raises(DataError, match=r"packing_length=10 is below .*samples that stay together\), of 12 tokens"):
        Schedule(np.full(6, 6), items=np.array([0, 2, 4, 6]), global_batch_size=1, packing_length=10)


def test_too_few_items_are_counted_as_such() -> None:
    with pytest.raises(DataError, match="global_batch_size=4 is more than the 3 items of the training data"):
        Schedule(np.full(6, 6), items=np.array([0, 2, 4, 6]), global_batch_size=4).require_a_batch()
