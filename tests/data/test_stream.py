"""A stream's blocks, packs and places, without a trainer."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.sources import resolve
from megabatch.data.stream import Drawn, Place, Stream
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError

ROWS = 300
BLOCKS = (128, 128, 44)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stream")
    paths = []
    for name, rows in (("a", range(200)), ("b", range(200, ROWS))):
        said = [{"query": f"What is {row}?", "response": "apple " * (row * 7 % 13 + 1)} for row in rows]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in said))
    return [str(path) for path in paths]


@pytest.fixture
def stream(files: list[str], tokenizer_folder: Path) -> Stream:
    return Stream(sources=resolve(files), encoding=Encoding(tokenizer=tokenizer_folder), vocab_size=400,
                  global_batch_size=7, seed=3, shuffle=True, shuffle_epochs=True, block_rows=100)  # fmt: skip


def rows_of(drawn: Drawn) -> list[int]:
    """Numbers of the rows over both files, pack by pack."""
    data = drawn.samples
    places = [data.origin(index) for index in range(len(data))]
    return [place.number - 1 + (200 if place.file.endswith("b.jsonl") else 0) for place in places]


def same(one: Drawn, other: Drawn) -> bool:
    arrays = [(getattr(one.samples, name), getattr(other.samples, name)) for name in ("ids", "weights", "lengths")]
    return all((a == b).all() for a, b in arrays) and (one.packs, one.place) == (other.packs, other.place)


def test_every_row_is_drawn_once_an_epoch_and_shuffled_within_its_block(stream: Stream) -> None:
    drawn = [row for batch in islice(stream.batches(Place()), 2 * ROWS // 7 + 1) for row in rows_of(batch)]
    first, second = drawn[:ROWS], drawn[ROWS : 2 * ROWS]
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    start = 0
    for size in BLOCKS:
        block = first[start : start + size]
        assert sorted(block) == list(range(start, start + size)) != block
        start += size


def test_the_same_order_again_without_shuffling(stream: Stream) -> None:
    plain = replace(stream, shuffle=False)
    assert [row for batch in islice(plain.batches(Place()), 42) for row in rows_of(batch)] == list(range(294))
    again = replace(stream, shuffle_epochs=False)
    drawn = [row for batch in islice(again.batches(Place()), 2 * ROWS // 7 + 1) for row in rows_of(batch)]
    assert drawn[:ROWS] == drawn[ROWS : 2 * ROWS]


def test_tokens_are_those_of_a_cache(stream: Stream, files: list[str], tmp_path: Path) -> None:
    cache = TokenCache.open(TokenCache.build(resolve(files), stream.encoding, cache_dir=tmp_path))
    for batch in islice(stream.batches(Place()), 5):
        for index, row in enumerate(rows_of(batch)):
            found, expected = batch.samples[index], cache[row]
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.weights.tolist() == expected.weights.tolist()
            assert batch.samples.sums[index] == cache.sums[row]


@pytest.mark.parametrize("changes", [{}, {"packing_length": 64}, {"shuffle": False}, {"num_proc": 2}])
def test_a_stream_goes_on_from_any_place(stream: Stream, changes: dict[str, Any]) -> None:
    changed = replace(stream, **changes)
    whole = list(islice(changed.batches(Place(data="x")), 60))
    assert whole[-1].place.epoch == (1 if "packing_length" not in changes else whole[-1].place.epoch)
    for stop in (1, 17, 18, 19, 43, 50):
        saved = Place.from_json(json.loads(json.dumps(whole[stop - 1].place.to_json())))
        assert len(json.dumps(saved.to_json())) < 100
        for found, expected in zip(islice(changed.batches(saved), 4), whole[stop:], strict=False):
            assert same(found, expected)


def test_packs_hold_whole_samples_of_one_block(stream: Stream) -> None:
    packed = replace(stream, packing_length=64)
    batches = []
    for batch in packed.batches(Place()):
        if batch.place.epoch:
            break
        batches.append(batch)
    counted: Counter[int] = Counter(row for batch in batches for row in rows_of(batch))
    assert max(counted.values()) == 1 and len(counted) > ROWS - 7 * 20
    for batch in batches:
        assert sum(batch.packs) == len(batch.samples)
        ends = [0]
        for count in batch.packs:
            ends.append(ends[-1] + count)
        assert all(batch.samples.lengths[a:b].sum() <= 64 for a, b in pairwise(ends))


def test_faults_name_the_row_and_the_fix(stream: Stream, tmp_path: Path) -> None:
    small = replace(stream, global_batch_size=ROWS + 1)
    with pytest.raises(DataError, match="is more than the 300 samples or packs"):
        next(small.batches(Place()))
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: contains the token .* and the model's embedding has 260 rows"):
        next(replace(stream, vocab_size=260).batches(Place()))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"query": "a", "response": "b"}\n' * 200 + "no json\n")
    faulty = replace(stream, sources=resolve([str(broken)]))
    with pytest.raises(DataError, match=r"broken\.jsonl:201: not valid JSON"):
        list(islice(faulty.batches(Place()), 40))
    with pytest.raises(DataError, match=r"is no place in a stream; resume with the data\.streaming of the run"):
        Place.from_json({"epoch": 0, "offset": 3, "data": "a:b"})


def test_a_fingerprint_knows_sizes_settings_and_order(stream: Stream, files: list[str], tmp_path: Path) -> None:
    fingerprint = stream.fingerprint(tmp_path)
    assert fingerprint == replace(stream, num_proc=4, global_batch_size=3, block_rows=128).fingerprint(tmp_path)
    changes = [{"seed": 4}, {"shuffle": False}, {"block_rows": 129}, {"packing_length": 64},
               {"encoding": replace(stream.encoding, max_length=50)}, {"sources": resolve(files[:1])}]  # fmt: skip
    assert len({fingerprint, *(replace(stream, **some).fingerprint(tmp_path) for some in changes)}) == 7


def test_memory_does_not_grow_with_the_stream(stream: Stream, tmp_path: Path) -> None:
    peaks = []
    for rows in (384, 1152):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text('{"query": "What is it?", "response": "%s"}\n' % ("apple " * 4) * rows)
        batches = replace(stream, sources=resolve([str(path)])).batches(Place())
        next(batches)
        tracemalloc.start()
        for batch in batches:
            if batch.place.epoch:
                break
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
