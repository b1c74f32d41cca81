from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows import digests, files
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.sources import resolve
from megabatch.data.tokens.encoding import Encoding


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read whole, in order."""
    seen: list[str] = []
    original = files.content_digest

    def noted(path: Path) -> bytes:
        seen.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(files, "content_digest", noted)
    return seen


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the clock had gone on by an hour since the files were written."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)


def remembered(folder: Path, path: Path) -> bytes:
    known = Digests(folder)
    digest = known.content(path)
    known.save()
    return digest


def test_an_unchanged_file_is_read_once(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    expected = hashlib.blake2b(b"content").digest()
    assert [remembered(tmp_path / "cache", path) for _ in range(3)] == [expected] * 3
    assert read == ["a.jsonl"]


def test_an_edit_is_found_though_size_and_mtime_are_put_back(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    before = path.stat()
    remembered(tmp_path / "cache", path)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has moved on
        path.write_bytes(b"CONTENT")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert remembered(tmp_path / "cache", path) == hashlib.blake2b(b"CONTENT").digest()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    ahead = time.time() + 1000  # it stays just written however slow this machine is
    path.write_bytes(b"content")
    os.utime(path, (ahead, ahead))
    for _ in range(2):
        remembered(tmp_path / "cache", path)
    assert read == ["a.jsonl"] * 2


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 3}', '{"a": [1, 2, 3, 4, "zz"]}'])
def test_a_damaged_memory_is_none(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    path, folder = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"content")
    folder.mkdir()
    (folder / digests.NAME).write_text(damage)
    assert remembered(folder, path) == hashlib.blake2b(b"content").digest()
    assert str(path) in (folder / digests.NAME).read_text()


def test_several_attempts_keep_what_each_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    first, second = Digests(tmp_path / "cache"), Digests(tmp_path / "cache")
    for known, name in ((first, "a"), (second, "b")):
        (tmp_path / name).write_text(name)
        known.content(tmp_path / name)
    first.save()
    second.save()
    assert {Path(name).name for name in digests._read(tmp_path / "cache" / digests.NAME)} == {"a", "b"}


def test_a_warm_start_reads_no_file_whole(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer_folder: Path, read: list[str], monkeypatch: Any
) -> None:
    settle(monkeypatch)
    path = write_jsonl("a.jsonl", [{"query": "Q", "response": "A"}] * 3)
    for _ in range(2):
        read.clear()
        TokenCache.build(resolve([str(path)]), Encoding(tokenizer=tokenizer_folder), cache_dir=tmp_path / "cache")
    assert [name for name in read if not name.endswith(".py")] == []
