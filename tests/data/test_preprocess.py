"""A user's own function for each row: what becomes of its rows, and one line for whatever goes wrong in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.cache.cache_key import cache_key
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.preprocess import DROPPED, Preprocess
from megabatch.data.rows.sources import resolve
from megabatch.data.stream import Place, Stream
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import ConfigError, DataError

SOURCE = """
def tidy(row):
    number = row.pop("n")
    if number % 5 == 0:
        return None
    made = {"question": f"{number}?", "response": str(number)}
    return [made, made] if number % 5 == 1 else made
"""
FAULTY = """
import os, time

def raises(row):
    return {"query": row["q"], "response": missing}

def hangs(row):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def dies(row):
    os._exit(3)

def odd(row):
    return [{"query": "a"}, 5]

def two(row, other): ...

class Tidy: ...
"""

WriteJsonl = Callable[[str, Any], Path]


@pytest.fixture
def tidy(tmp_path: Path) -> str:
    (tmp_path / "rows.py").write_text(SOURCE)
    return f"{tmp_path / 'rows.py'}:tidy"


def _encoding(folder: Path, preprocess: str, **fields: Any) -> Encoding:
    return Encoding(tokenizer=folder, preprocess=preprocess, columns={"question": "query"}, **fields)


def _built(sources: list[Path], encoding: Encoding, folder: Path) -> TokenCache:
    resolved = resolve(list(map(str, sources)))
    return TokenCache.open(TokenCache.build(resolved, encoding, cache_dir=folder))


def test_it_makes_and_drops_rows_in_their_place(
    tidy: str, tokenizer_folder: Path, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    data = write_jsonl("a.jsonl", [{"n": n} for n in range(300)])
    encoding = _encoding(tokenizer_folder, tidy)
    cache = _built([data], encoding, tmp_path / "one")
    expected = [n for n in range(300) for _ in range((0, 2, 1, 1, 1)[n % 5])]
    assert [cache.origin(i).number for i in range(len(cache))] == [n + 1 for n in expected]
    assert cache.meta["dropped"] == {DROPPED: 60}
    stream = Stream(
        sources=resolve([str(data)]), encoding=encoding, vocab_size=1000, global_batch_size=60, seed=1, shuffle=False,
        shuffle_epochs=False, block_rows=128,
    )  # fmt: skip
    drawn = [next(batches) for batches in [stream.batches(Place())] for _ in range(5)]
    assert [batch.samples.ids.tolist() for batch in drawn] == [
        [int(token) for i in range(start, start + 60) for token in cache[i].ids] for start in range(0, 300, 60)
    ]


def test_its_source_names_the_cache_and_its_place_does_not(
    tidy: str, tokenizer_folder: Path, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    sources = resolve([str(write_jsonl("a.jsonl", [{"n": 1}]))])

    def key(preprocess: str, **fields: Any) -> str:
        encoding = _encoding(tokenizer_folder, preprocess, **fields)
        return cache_key(sources, encoding, seed=1, shuffle=True, digests=Digests(tmp_path))

    moved = tmp_path / "moved.py"
    moved.write_text(SOURCE)
    assert key(f"{moved}:tidy", preprocess_timeout_s=5.0) == key(tidy)
    moved.write_text(SOURCE.replace("number % 5 == 0", "number % 7 == 0"))
    assert key(f"{moved}:tidy") != key(tidy)


def test_a_row_that_is_drawn_twice_stays_what_it_is(tidy: str) -> None:
    row = Row(Origin("a.parquet", 0, is_line=False), {"n": 2})
    preprocess = Preprocess(tidy, timeout_s=60)
    assert preprocess(row) == preprocess(row) == [Row(row.origin, {"question": "2?", "response": "2"})]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", r"a\.jsonl:1: data\.preprocess raises failed at f\.py:5: NameError: name 'missing' is not defined"),
        ("hangs", r"a\.jsonl:1: data\.preprocess hangs took longer than preprocess_timeout_s=0\.2, at f\.py:\d+; "),
        ("odd", r"a\.jsonl:1: data\.preprocess odd returned a list with a value of type int; it must return a row"),
    ],
)
def test_what_goes_wrong_is_one_line(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FAULTY)
    timeout_s = 0.2 if name == "hangs" else 60
    with pytest.raises(DataError, match=said) as error:
        Preprocess(f"{tmp_path / 'f.py'}:{name}", timeout_s=timeout_s)(Row(Origin("a.jsonl", 1), {"q": "a"}))
    assert "\n" not in str(error.value)


def test_a_process_that_it_ends_is_told(tokenizer_folder: Path, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FAULTY)
    encoding = _encoding(tokenizer_folder, f"{tmp_path / 'f.py'}:dies")
    with pytest.raises(DataError, match=r"process died \(exit status 3\).* or data\.preprocess=.*f\.py:dies ended it"):
        _built([write_jsonl("a.jsonl", [{"q": "a"}])], encoding, tmp_path / "caches")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("f.py", "must be a Python file and a function in it, such as my_rows.py:tidy"),
        ("f.py:rais", "has no function rais; did you mean raises?"),
        ("f.py:two", r"two must take one argument, the row \(missing a required argument: 'other'\)"),
        ("f.py:Tidy", "Tidy is a class; give a function that takes a row"),
        ("none.py:tidy", "does not exist; check the path"),
    ],
)
def test_what_cannot_be_called_is_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FAULTY)
    with pytest.raises(ConfigError, match=said):
        Preprocess(str(tmp_path / name), timeout_s=60)
