"""Rows drawn from several datasets: the same as by Hugging Face's `interleave_datasets`, and the same in a stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megabatch.data.cache.cache_key import cache_key
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import parsed
from megabatch.data.rows.mixing import Mixing, rows_of
from megabatch.data.rows.sources import Source, resolve
from megabatch.data.stream import Place, Stream
from megabatch.data.tokens.encoding import Encoding

SIZES = {"a": 7, "b": 190, "c": 60}
PROBABILITIES = (0.1, 0.55, 0.35)
WriteJsonl = Callable[[str, Any], Path]


@pytest.fixture
def sources(write_jsonl: WriteJsonl) -> list[Source]:
    files = [write_jsonl(f"{name}.jsonl", _rows(name)) for name in SIZES]
    return resolve(list(map(str, files)))


def _rows(name: str) -> list[dict[str, str]]:
    return [{"text": f"{name}{number}"} for number in range(SIZES[name])]


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_draws_are_those_of_datasets(
    strategy: Any, seed: int, sources: list[Source], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = datasets.interleave_datasets(
        [datasets.Dataset.from_list(_rows(name)) for name in SIZES],
        probabilities=list(PROBABILITIES),
        seed=seed,
        stopping_strategy=strategy,
    )["text"]
    with caplog.at_level(logging.INFO):
        drawn = rows_of(sources, seed=seed, shuffle=True, mixing=Mixing(PROBABILITIES, strategy))
        own = [parsed(row).fields["text"] for row in drawn]
    assert own == list(theirs)
    counts = [sum(text.startswith(name) for text in own) for name in SIZES]
    assert f"mixed by data.interleave_prob until {strategy}: {counts[0]} rows of " in caplog.text


def test_a_count_is_a_dataset_of_that_many_rows(sources: list[Source], write_jsonl: WriteJsonl) -> None:
    few = [*resolve([f"{sources[1].paths[0]}#5"]), sources[2]]
    drawn = list(rows_of(few, seed=3, shuffle=True, mixing=Mixing((0.9, 0.1))))
    taken = [parsed(row).fields["text"] for row in drawn]
    chosen = [parsed(row).fields["text"] for row in few[0].unparsed(seed=3, shuffle=True)]
    assert [text for text in taken if text.startswith("b")] == chosen and len(chosen) == 5


def test_a_stream_draws_what_a_cache_has_and_resumes_anywhere(
    sources: list[Source], tokenizer_folder: Path, tmp_path: Path
) -> None:
    encoding = Encoding(tokenizer=tokenizer_folder, rows="documents")
    mixing = Mixing(PROBABILITIES, "all_exhausted")
    path = TokenCache.build(sources, encoding, cache_dir=tmp_path, seed=5, mixing=mixing)
    cache = TokenCache.open(path)
    expected = [cache[i].ids.tolist() for i in range(len(cache))]
    assert len(expected) > 2 * sum(SIZES.values()) // 2 > 256
    stream = Stream(
        sources=sources, encoding=encoding, vocab_size=1000, global_batch_size=50, seed=5, shuffle=False,
        shuffle_epochs=False, block_rows=128, mixing=mixing,
    )  # fmt: skip
    batches = stream.batches(Place())
    drawn = [next(batches) for _ in range(2 + len(expected) // 50)]
    batches.close()
    ids = [batch.samples[i].ids.tolist() for batch in drawn for i in range(50)]
    assert ids == (expected + expected)[: len(ids)], "an epoch begins as the one before"
    for number in (1, 4):
        again = next(stream.batches(drawn[number - 1].place))
        assert again.samples.ids.tolist() == drawn[number].samples.ids.tolist()


def test_cache_and_place_know_the_mixture(sources: list[Source], tokenizer_folder: Path, tmp_path: Path) -> None:
    encoding = Encoding(tokenizer=tokenizer_folder)

    def names(mixing: Mixing | None, seed: int) -> tuple[str, str]:
        key = cache_key(sources, encoding, seed=seed, shuffle=True, digests=Digests(tmp_path), mixing=mixing)
        stream = Stream(
            sources=sources, encoding=encoding, vocab_size=1000, global_batch_size=5, seed=seed, shuffle=True,
            shuffle_epochs=True, block_rows=128, mixing=mixing,
        )  # fmt: skip
        return key, stream.fingerprint(tmp_path)

    found = [
        names(mixing, seed)
        for mixing, seed in [
            (None, 1),
            (Mixing(PROBABILITIES), 1),
            (Mixing(PROBABILITIES), 2),
            (Mixing(PROBABILITIES, "all_exhausted"), 1),
            (Mixing((0.2, 0.45, 0.35)), 1),
        ]
    ]
    assert len({key for key, _ in found}) == len({place for _, place in found}) == len(found)
