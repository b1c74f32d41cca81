from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from megabatch.data.cache import cache_files, cache_key, datasets
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows import digests
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.sources import resolve
from megabatch.data.tokens import workers
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError

Write = Callable[..., Path]


def rows(count: int) -> list[dict[str, str]]:
    return [{"query": f"What is {index}?", "response": "apple " * (index % 7 + 1)} for index in range(count)]


def caches_in(folder: Path) -> list[str]:
    """All that lies beside the remembered digests, temporary folders too."""
    return [entry.name for entry in folder.iterdir() if entry.name != digests.NAME]


@pytest.fixture
def build(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def call(*paths: Any, num_proc: int = 1, seed: int = 1, **settings: Any) -> Path:
        encoding = Encoding(tokenizer=tokenizer_folder, **settings)
        sources = resolve([str(path) for path in paths])
        return TokenCache.build(sources, encoding, cache_dir=tmp_path / "cache", seed=seed, num_proc=num_proc)

    return call


def test_a_cache_gives_back_what_the_encoder_made(build: Any, write_jsonl: Write, tokenizer_folder: Path) -> None:
    path = write_jsonl("a.jsonl", rows(10))
    cache = TokenCache.open(build(path))
    (source,) = resolve([str(path)])
    expected = Encoder(Encoding(tokenizer=tokenizer_folder)).encode(list(source.rows(seed=0, shuffle=False))).samples
    assert len(cache) == 10
    for index, sample in enumerate(expected):
        assert cache[index].ids.tolist() == sample.ids.tolist()
        assert cache[index].weights.tolist() == sample.weights.tolist()
        assert cache.sums[index] == sample.weights.sum()
        assert str(cache.origin(index)) == f"{path}:{index + 1}"
        assert str(cache.place(**cache[index].columns)) == f"{path}:{index + 1}"
    assert cache.max_id == max(int(sample.ids.max()) for sample in expected)


def test_processes_make_the_same_files(build: Any, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 16)
    path = write_jsonl("a.jsonl", rows(100))
    one = build(path)
    contents = {file.name: file.read_bytes() for file in one.iterdir()}
    for file in one.iterdir():
        file.unlink()
    assert build(path, num_proc=2) == one
    assert {file.name: file.read_bytes() for file in one.iterdir()} == contents


def test_a_faulty_row_in_another_process_is_named(
    build: Any, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 16)
    path = write_jsonl("a.jsonl", [*rows(40), {"query": "Q", "response": 3}, *rows(40)])
    with pytest.raises(DataError, match=r"a\.jsonl:41: response must be a string"):
        build(path, num_proc=2)
    assert not caches_in(tmp_path / "cache")


def test_only_the_tokenising_processes_get_the_allocators_settings(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_serve", _tell_tunables)
    for own, seen in ((None, "glibc.malloc.tcache_count=200"), ("glibc.malloc.check=1", "glibc.malloc.check=1")):
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if own:
            monkeypatch.setenv("GLIBC_TUNABLES", own)
        made = workers._Workers(Encoding(tokenizer=tokenizer_folder), 1)
        assert made._ends[0].recv() == seen
        assert os.environ.get("GLIBC_TUNABLES") == own
        made.close()


def _tell_tunables(_: Encoding, ends: list[Connection], __: Connection) -> None:
    ends[0].send(os.environ["GLIBC_TUNABLES"])


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_tokenising_process_that_dies_is_one_clear_error(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 1)
    fatal = [Row(Origin("a.jsonl", number), {"query": Fatal()}) for number in (1, 2)]
    with pytest.raises(
        DataError, match=r"a tokenising process died \(exit status 9\).*lower data\.dataset_num_proc=2"
    ):
        list(workers.encoded_chunks(fatal, Encoding(tokenizer=tokenizer_folder), num_proc=2))


def test_it_is_reused_until_anything_that_matters_changes(build: Any, write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", rows(10))
    first = build(path, max_length=100)
    made = (first / "meta.json").stat().st_mtime_ns
    assert build(path, max_length=100, seed=2) == first, "the seed chooses nothing here"
    assert (first / "meta.json").stat().st_mtime_ns == made
    others = {build(path, max_length=99), build(path, loss_scale="all"), build(path, template="plain"),
              build(f"{path}#5", seed=1), build(f"{path}#5", seed=2), build(path, path)}  # fmt: skip
    write_jsonl("a.jsonl", rows(11))
    others.add(build(path, max_length=100))
    assert len(others | {first}) == 8


def test_its_name_knows_all_that_decides_tokens(
    tokenizer_folder: Path, tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 64}')
    sources = resolve([str(write_jsonl("a.jsonl", rows(2)))])

    def key() -> str:
        return cache_key.cache_key(
            sources, Encoding(tokenizer=folder), seed=1, shuffle=True, digests=Digests(tmp_path / "none")
        )

    first = key()
    (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 128}')
    (folder / "model.safetensors").write_text("weights")
    assert key() == first, "another model with the same tokenizer"
    keys = [first]
    (folder / "config.json").write_text('{"model_type": "gemma3_text", "hidden_size": 128}')
    keys.append(key())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    keys.append(key())
    for library in ("transformers", "tokenizers"):
        with monkeypatch.context() as patched:
            version = cache_key._version
            patched.setattr(cache_key, "_version", lambda n, old=version, new=library: "0" if n == new else old(n))
            keys.append(key())
    monkeypatch.setattr(cache_key, "_code_digest", lambda: "other code")
    keys.append(key())
    assert len(set(keys)) == 6


def test_its_content_is_that_of_the_tokens(build: Any, write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", rows(40))
    first = TokenCache.open(build(path))
    moved = TokenCache.open(build(path.rename(path.with_name("b.jsonl"))))
    assert moved.content == first.content
    edited = rows(40)
    edited[7]["response"] = edited[7]["response"].replace("apple", "are a")
    other = TokenCache.open(build(write_jsonl("a.jsonl", edited)))
    assert other.lengths.tolist() == first.lengths.tolist()
    assert other.content != first.content
    parts = {part.content for seed in (1, 2) for part in first.split(0.25, seed=seed)}
    assert len(parts | {first.content}) == 5


def test_prompts_name_the_place_where_their_rows_are_now(build: Any, write_jsonl: Write) -> None:
    """GRPO reads a prompt's row there again; other rows need no second cache where only the place is another."""
    path = write_jsonl("a.jsonl", rows(4))
    for kind in ("prompts", "conversations"):
        first = build(path, rows=kind)
        path = path.rename(path.with_name(f"{kind}.jsonl"))
        again = build(path, rows=kind)
        assert (again == first) == (kind == "conversations")
        if kind == "prompts":
            assert [TokenCache.open(again).origin(index) for index in range(4)] == [
                Origin(str(path), number) for number in (1, 2, 3, 4)
            ]


def wait_for_the_clock_to_move_on(file: Path) -> None:
    """Until a write now gets another time than this file's."""
    probe = file.with_name("probe")
    while not probe.exists() or probe.stat().st_mtime_ns <= file.stat().st_mtime_ns:
        probe.write_text("")
    probe.unlink()


@pytest.mark.parametrize("damage", ["flip", "truncate", "meta", "missing"])
def test_a_damaged_cache_is_made_again(build: Any, write_jsonl: Write, damage: str, caplog: Any) -> None:
    path = write_jsonl("a.jsonl", rows(10))
    folder = build(path)
    good = (folder / "ids.bin").read_bytes()
    wait_for_the_clock_to_move_on(folder / "ids.bin")
    if damage == "flip":
        (folder / "ids.bin").write_bytes(bytes([good[0] ^ 1]) + good[1:])
    elif damage == "truncate":
        (folder / "ids.bin").write_bytes(good[:-4])
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        (folder / "sums.bin").unlink()
    if damage != "flip":  # only a checksum finds a flipped bit
        with pytest.raises(DataError, match=r"damaged token cache .*; delete the folder"):
            TokenCache.open(folder)
    with caplog.at_level(logging.WARNING):
        assert build(path) == folder
    assert "damaged token cache" in caplog.text
    assert (folder / "ids.bin").read_bytes() == good
    assert len(TokenCache.open(folder, digests=Digests(folder.parent))) == 10
    assert caches_in(folder.parent) == [folder.name]


def test_a_full_disk_leaves_nothing_behind(
    build: Any, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_files._Column, "append", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); free space"):
        build(write_jsonl("a.jsonl", rows(3)))
    assert not caches_in(tmp_path / "cache")


def test_a_cache_that_another_job_finishes_first_is_kept(
    build: Any, write_jsonl: Write, tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = write_jsonl("a.jsonl", rows(3))
    folder = build(path)
    before = (folder / "meta.json").stat().st_ino
    (source,) = resolve([str(path)])
    encoder = Encoder(Encoding(tokenizer=tokenizer_folder))
    cache_files.write(folder, [encoder.encode(list(source.rows(seed=0, shuffle=False))).arrays()])
    assert (folder / "meta.json").stat().st_ino == before
    assert caches_in(folder.parent) == [folder.name]


def test_no_sample_left_says_why(build: Any, write_jsonl: Write, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is left: 3 rows longer than max_length \(the first is .*a\.jsonl:1\); check the data"
    ):
        build(write_jsonl("a.jsonl", rows(3)), max_length=4)
    assert not caches_in(tmp_path / "cache")


def test_dropped_rows_are_reported(build: Any, write_jsonl: Write, caplog: Any) -> None:
    path = write_jsonl("a.jsonl", [*rows(3), {"query": "Q", "response": "A " * 300}])
    with caplog.at_level(logging.INFO):
        cache = TokenCache.open(build(path, max_length=200))
    assert cache.dropped == {"longer than max_length": 1}
    assert "3 samples," in caplog.text
    dropped = caplog.records[-1]
    assert (dropped.levelname, dropped.getMessage()) == (
        "WARNING",
        f"1 of 4 rows (25.0 %) dropped: longer than max_length; the first is {path}:4",
    )


def test_split_is_seeded_and_disjoint(build: Any, write_jsonl: Write) -> None:
    cache = TokenCache.open(build(write_jsonl("a.jsonl", rows(40))))
    train, validation = cache.split(0.1, seed=1)
    lines = [set(part.origins[:, 1].tolist()) for part in (train, validation)]
    assert (len(train), len(validation)) == (36, 4)
    assert lines[0] | lines[1] == set(range(1, 41))
    assert cache.split(0.1, seed=1)[1].origins.tolist() == validation.origins.tolist()
    assert cache.split(0.1, seed=2)[1].origins.tolist() != validation.origins.tolist()
    line = int(validation.origins[0, 1])
    assert validation[0].ids.tolist() == cache[line - 1].ids.tolist()
    with pytest.raises(DataError, match=r"split_dataset_ratio=0\.01 of 40 samples leaves 0 for validation"):
        cache.split(0.01, seed=1)


def test_a_split_can_keep_what_was_made_of_a_row_together(build: Any, write_jsonl: Write) -> None:
    cache = TokenCache.open(build(write_jsonl("a.jsonl", rows(40))))
    origins = np.array(cache.origins)
    origins[:, 1] = (origins[:, 1] + 1) // 2  # two items of each of 20 rows
    cache = replace(cache, origins=origins)
    train, validation = cache.split(0.1, seed=1, whole_rows=True)
    assert (len(train), len(validation)) == (36, 4)
    assert not set(train.origins[:, 1].tolist()) & set(validation.origins[:, 1].tolist())
    with pytest.raises(DataError, match=r"split_dataset_ratio=0\.02 of 20 rows leaves 0 for validation"):
        cache.split(0.02, seed=1, whole_rows=True)


def test_a_runs_datasets(tokenizer_folder: Path, write_jsonl: Write, tmp_path: Path) -> None:
    train, validation = write_jsonl("a.jsonl", rows(20)), write_jsonl("b.jsonl", rows(3))
    encoding = Encoding(tokenizer=tokenizer_folder)
    cache_dir = tmp_path / "cache"
    paths = datasets.build(
        encoding, vocab_size=400, dataset=[str(train)], val_dataset=[str(validation)], cache_dir=cache_dir
    )
    assert [len(part) for part in datasets.open_caches(paths, split_dataset_ratio=0.5) if part is not None] == [20, 3]
    paths = datasets.build(encoding, vocab_size=400, dataset=[str(train), str(validation)], cache_dir=cache_dir)
    assert [len(part) for part in datasets.open_caches(paths, split_dataset_ratio=0.5) if part is not None] == [11, 12]
    assert datasets.open_caches(paths)[1] is None
    with pytest.raises(DataError, match=r"data\.dataset is not set"):
        datasets.build(encoding, vocab_size=400, dataset=[], cache_dir=cache_dir)


def test_a_missing_tokenizer_is_named(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", rows(3))
    with pytest.raises(DataError, match=r"model\.tokenizer: there is no folder"):
        TokenCache.build(resolve([str(path)]), Encoding(tokenizer=tmp_path / "none"), cache_dir=tmp_path / "cache")


def test_each_chunk_of_rows_is_a_sign_of_life(write_jsonl: Write, tokenizer_folder: Path, tmp_path: Path) -> None:
    chunks: list[None] = []
    sources, encoding = resolve([str(write_jsonl("a.jsonl", rows(1100)))]), Encoding(tokenizer=tokenizer_folder)
    for _ in range(2):  # a cache that is there needs none
        TokenCache.build(sources, encoding, cache_dir=tmp_path / "cache", on_chunk=lambda: chunks.append(None))
        assert len(chunks) == -(-1100 // workers.CHUNK_ROWS)


def test_column_names_may_be_a_read_only_view(build: Any, write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", [{"ask": "Q", "say": "A"}])
    assert len(TokenCache.open(build(path, columns=MappingProxyType({"ask": "query", "say": "response"})))) == 1


def test_arrays_are_mapped_not_read(build: Any, write_jsonl: Write) -> None:
    cache = TokenCache.open(build(write_jsonl("a.jsonl", rows(3))))
    assert isinstance(cache.ids, np.memmap)
    assert json.loads((cache.path / "meta.json").read_text())["samples"] == 3
