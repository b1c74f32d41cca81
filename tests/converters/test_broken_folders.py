"""Corrupt headers, indices and folders: always one ConversionError, never a crash, a hang or a wrong answer."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.safetensors_io import HfFolder, Writer, split_shards, write_index
from megabatch.errors import ConversionError

INDEX = "model.safetensors.index.json"
Header = dict[str, Any]


def raw_file(path: Path, header: Header | bytes, data: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def good_header() -> Header:
    return {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }


DATA = bytes(range(22))


def _set(name: str, key: str, value: object) -> Callable[[Header], None]:
    return lambda header: header[name].__setitem__(key, value)


BAD_HEADERS: dict[str, tuple[Callable[[Header], object], str]] = {
    "unknown dtype": (_set("a", "dtype", "F31"), "unknown dtype 'F31'"),
    "dtype no string": (_set("a", "dtype", ["F32"]), "unknown dtype"),
    "negative dimension": (_set("a", "shape", [-2, -2]), "no valid shape"),
    "shape no list": (_set("a", "shape", 4), "no valid shape"),
    "true as dimension": (_set("a", "shape", [True, 4]), "no valid shape"),
    "float dimension": (_set("a", "shape", [2.0, 2]), "no valid shape"),
    "shape and extent differ": (_set("a", "shape", [2, 3]), "needs 24 bytes, its data_offsets give 16"),
    "shape overflows": (_set("a", "shape", [2**62, 2**62, 2**62]), "needs"),
    "offsets reversed": (_set("a", "data_offsets", [16, 0]), "needs 16 bytes"),
    "three offsets": (_set("a", "data_offsets", [0, 8, 16]), "no valid data_offsets"),
    "huge offset": (_set("a", "data_offsets", [0, 2**70]), "no valid data_offsets"),
    "overlap": (_set("b", "data_offsets", [10, 16]), "other tensors overlap b"),
    "hole": (_set("b", "data_offsets", [18, 24]), "there is a gap before b"),
    "beyond the end": (lambda header: header.update(c={"dtype": "U8", "shape": [9], "data_offsets": [22, 31]}),
                       "truncated: its header gives"),
    "data that nothing uses": (lambda header: header.pop("b"), "too long"),
    "extra key": (_set("a", "stride", [1]), "and nothing else"),
    "missing key": (lambda header: header["a"].pop("dtype"), "must have dtype"),
    "entry no object": (lambda header: header.update(a=[1]), "must have dtype"),
    "metadata no strings": (lambda header: header.update(__metadata__={"format": 1}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_bad_header(fault: str, tmp_path: Path) -> None:
    change, message = BAD_HEADERS[fault]
    header = good_header()
    change(header)
    raw_file(tmp_path / "model.safetensors", header, DATA)
    with pytest.raises(ConversionError, match=message) as caught:
        HfFolder(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        (b"", None, "header length 0"),
        (b"{}", 2**63, "header length"),
        (b"{}", 10**9, "header length"),
        (b'{"a":', None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (b"\xff\xfe{}", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b'{"\\ud800": 1}', None, "not valid JSON"),
        (json.dumps(good_header()).replace('"b"', '"a"').encode(), None, "a occurs twice"),
        (rb'{"b\n\u001b": 1}', None, r"the name 'b\\n\\x1b' has control characters"),
    ],
)
def test_bad_header_text(text: bytes, length: int | None, message: str, tmp_path: Path) -> None:
    raw_file(tmp_path / "model.safetensors", text, DATA, length=length)
    with pytest.raises(ConversionError, match=message):
        HfFolder(tmp_path)


def test_files_that_are_too_short(tmp_path: Path) -> None:
    raw_file(tmp_path / "whole", good_header(), DATA)
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ConversionError):
            HfFolder(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    entries = {name: TensorInfo("F32", (4,)) for name in "abcd"}
    shards = split_shards(entries, max_shard_size=32)
    for shard in shards:
        with Writer(tmp_path / shard.name, shard.entries) as writer:
            for name in shard.entries:
                writer.write(name, bytes(16))
    write_index(tmp_path, shards)
    HfFolder(tmp_path)
    return tmp_path


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BAD_INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tensor in the wrong file": (lambda index: index["weight_map"].update(a=TWO), f"{ONE}: has a, which"),
    "tensor not named": (lambda index: index["weight_map"].pop("b"), f"{ONE}: has b, which .* puts in no file"),
    "tensor nowhere": (lambda index: index["weight_map"].update(e=TWO), f"{TWO}: e is not in it"),
    "missing file": (lambda index: index["weight_map"].update(a="other.safetensors"), "No such file"),
    "path outside": (lambda index: index["weight_map"].update(a=f"../{ONE}"), "not a safetensors file of this folder"),
    "pickle": (lambda index: index["weight_map"].update(a="model.bin"), "not a safetensors file of this folder"),
    "number for a file": (lambda index: index["weight_map"].update(a=1), "not a safetensors file of this folder"),
    "empty map": (lambda index: index["weight_map"].clear(), "no weight_map"),
    "no map": (lambda index: index.pop("weight_map"), "no weight_map"),
}


@pytest.mark.parametrize("fault", BAD_INDICES)
def test_bad_index(fault: str, sharded: Path) -> None:
    change, message = BAD_INDICES[fault]
    _edit_index(sharded, change)
    with pytest.raises(ConversionError, match=message):
        HfFolder(sharded)


def test_duplicate_tensor_in_two_files(sharded: Path) -> None:
    (sharded / TWO).write_bytes((sharded / ONE).read_bytes())
    with pytest.raises(ConversionError, match=f"a is in two files, {ONE} and {TWO}|{TWO}: has a"):
        HfFolder(sharded)


def test_stale_files_beside_each_other(sharded: Path) -> None:
    raw_file(sharded / "model.safetensors", good_header(), DATA)
    with pytest.raises(ConversionError, match="remove the stale one"):
        HfFolder(sharded)


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such folder"):
        HfFolder(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"no model\.safetensors"):
        HfFolder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.symlink_to(weights)
    with pytest.raises(ConversionError, match=r"model\.safetensors is a link that leads nowhere"):
        HfFolder(tmp_path)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ConversionError, match=r"model\.safetensors is no regular file"):
        HfFolder(tmp_path)
    weights.rmdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        HfFolder(tmp_path)
    raw_file(tmp_path / ONE, good_header(), DATA)
    with pytest.raises(ConversionError, match="complete the download"):
        HfFolder(tmp_path)


def test_two_hundred_mutated_folders(sharded: Path) -> None:
    """A changed, cut or inserted byte of a header or index is an error, or the folder still reads to the end."""
    originals = {name: (sharded / name).read_bytes() for name in (ONE, TWO, INDEX)}
    rng = random.Random(7)
    refused = 0
    for _ in range(200):
        name = rng.choice(list(originals))
        (sharded / name).write_bytes(_mutated(originals[name], rng, header_only=name != INDEX))
        try:
            folder = HfFolder(sharded)
            assert sorted(folder.names) == sorted({*folder.names})
            for tensor in folder.names:
                assert len(folder.read(tensor).data) == 16
        except ConversionError:
            refused += 1
        (sharded / name).write_bytes(originals[name])
    assert refused > 150


def _mutated(raw: bytes, rng: random.Random, *, header_only: bool) -> bytes:
    end = 8 + struct.unpack("<Q", raw[:8])[0] if header_only else len(raw)
    at = rng.randrange(end)
    kind = rng.randrange(4)
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + raw[at + rng.randrange(1, 9) :]
    if kind == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]
    return raw[:at]
