"""Byte ranges, atomic writing, shards and indices, against the safetensors library's own reader and writer."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.safetensors_io import HfFolder, Writer, parse_size, split_shards, write_index
from megabatch.converters.safetensors_io.sharding import ShardFile
from megabatch.errors import ConversionError

RNG = np.random.default_rng(0)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return {
        "matrix": RNG.standard_normal((37, 11)).astype(np.float32),
        "wide": RNG.standard_normal((9, 20_000)).astype(np.float32),
        "cube": RNG.standard_normal((3, 8, 5)).astype(np.float16),
        "vector": RNG.standard_normal(13),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


@pytest.fixture
def folder(arrays: dict[str, np.ndarray], tmp_path: Path) -> HfFolder:
    save_file(arrays, tmp_path / "model.safetensors")
    return HfFolder(tmp_path)


def infos(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    names = {"float32": "F32", "float16": "F16", "float64": "F64"}
    return {name: TensorInfo(names[str(array.dtype)], array.shape) for name, array in arrays.items()}


def test_names_and_infos_are_those_of_the_file(folder: HfFolder, arrays: dict[str, np.ndarray]) -> None:
    assert folder.tensors == infos(arrays)
    assert sorted(folder.names) == sorted(arrays)


@pytest.mark.parametrize("name", ["matrix", "wide"])
@pytest.mark.parametrize("rows", [None, (0, 1), (3, 9), (5, 5)])
@pytest.mark.parametrize("cols", [None, (0, 4), (7, 11), (2, 2)])
def test_ranges_equal_numpy_slices(
    name: str,
    rows: tuple[int, int] | None,
    cols: tuple[int, int] | None,
    folder: HfFolder,
    arrays: dict[str, np.ndarray],
) -> None:
    part = folder.read(name, rows=rows, cols=cols)
    expected = arrays[name][slice(*rows or (None,)), slice(*cols or (None,))]
    assert part.shape == expected.shape
    assert bytes(part.data) == expected.tobytes()


def test_leading_index_rows_and_columns_together(folder: HfFolder, arrays: dict[str, np.ndarray]) -> None:
    for index in range(3):
        part = folder.read("cube", index=index, rows=(2, 7), cols=(1, 4))
        assert bytes(part.data) == arrays["cube"][index, 2:7, 1:4].tobytes()
    for name in ("vector", "scalar", "empty"):
        assert bytes(folder.read(name).data) == arrays[name].tobytes()


def test_only_the_bytes_asked_for_are_read(folder: HfFolder) -> None:
    folder.read("vector")
    before = _bytes_read()
    folder.read("wide", rows=(2, 6), cols=(100, 200))
    assert _bytes_read() - before < 4 * 400 + 2000  # /proc/self/io itself is part of the count


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"rows": (0, 38)}, r"no range \(0, 38\) in dimension 0"),
        ({"rows": (4, 3)}, "no range"),
        ({"cols": (-1, 3)}, "dimension 1"),
        ({"index": 37}, "no leading index 37"),
    ],
)
def test_a_range_outside_the_tensor_is_an_error(part: dict[str, object], message: str, folder: HfFolder) -> None:
    with pytest.raises(ConversionError, match=message):
        folder.read("matrix", **part)  # type: ignore[arg-type]


def test_unknown_tensor_and_wrong_buffer(folder: HfFolder) -> None:
    with pytest.raises(ConversionError, match="no tensor nothing"):
        folder.info("nothing")
    with pytest.raises(ConversionError, match="3 bytes given for a part of 1628"):
        folder.read_into("matrix", memoryview(bytearray(3)))


def test_same_compares_bytes(tmp_path: Path) -> None:
    big = RNG.integers(0, 2**16, (1200, 1000), np.uint16)
    other = big.copy()
    other[-1, -1] ^= 1
    save_file({"a": big, "b": big.copy(), "c": other, "d": big.reshape(1000, 1200)}, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    assert folder.same("a", "b")
    assert not folder.same("a", "c")
    assert not folder.same("a", "d")


def test_a_file_cut_after_opening_is_an_error(folder: HfFolder) -> None:
    os.truncate(folder.path / "model.safetensors", 1000)
    with pytest.raises(ConversionError, match="truncated while it was being read"):
        folder.read("wide")


def test_writer_takes_rows_in_any_order_from_threads(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with Writer(path, infos(arrays)) as writer:
        for name in ("vector", "scalar", "wide"):
            writer.write(name, arrays[name].tobytes())
        for index in (2, 0, 1):
            writer.write("cube", arrays["cube"][index].tobytes(), index=index)
        threads = [
            threading.Thread(
                target=lambda row: writer.write("matrix", arrays["matrix"][row].tobytes(), row_start=row), args=[row]
            )
            for row in reversed(range(37))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not path.exists()
    back = load_file(path)
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in back.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()
    }
    assert os.listdir(tmp_path) == ["out.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_writer_honours_the_umask(mask: int, tmp_path: Path) -> None:
    previous = os.umask(mask)
    try:
        with Writer(tmp_path / "a", {}):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    entries = {"a": TensorInfo("F32", (4, 2)), "b": TensorInfo("BF16", (3,))}
    with (
        pytest.raises(ConversionError, match="a is incomplete: 24 of 32 bytes written"),
        Writer(tmp_path / "f", entries) as w,
    ):
        w.write("b", bytes(6))
        w.write("a", bytes(8), row_start=0)
        w.write("a", bytes(16), row_start=2)
    with (
        pytest.raises(ConversionError, match="bytes 8 to 24 of a are written twice"),
        Writer(tmp_path / "f", entries) as w,
    ):
        w.write("a", bytes(16))
        w.write("a", bytes(16), row_start=1)
    with pytest.raises(ConversionError, match="outside a"), Writer(tmp_path / "f", entries) as w:
        w.write("a", bytes(16), row_start=3)
    with pytest.raises(ConversionError, match="no tensor c was announced"), Writer(tmp_path / "f", entries) as w:
        w.write("c", b"")
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "f", entries):
        raise KeyboardInterrupt
    with pytest.raises(ConversionError, match="disk full"):
        Writer(tmp_path / "f", {"a": TensorInfo("F32", (1 << 50,))})
    with pytest.raises(ConversionError, match="missing/f: cannot be written: No such file"):
        Writer(tmp_path / "missing" / "f", entries)
    with pytest.raises(ConversionError, match="dtype F7 is unknown"):
        Writer(tmp_path / "f", {"a": TensorInfo("F7", (1,))})
    assert os.listdir(tmp_path) == []


def test_a_failed_writer_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(ConversionError), Writer(tmp_path / "f", {"a": TensorInfo("F32", (1,))}):
        pass
    assert (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 << 30),
        ("1.5 KB", 1500),
        ("300MB", 3 * 10**8),
        (77, 77),
        ("2tib", 2 << 40),
        ("9B", 9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "5e3", "0"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConversionError, match="max_shard_size"):
        split_shards({"a": TensorInfo("F32", (1,))}, max_shard_size=text)


def _write_shards(folder: Path, arrays: dict[str, np.ndarray], limit: str) -> list[ShardFile]:
    shards = split_shards(infos(arrays), max_shard_size=limit)
    for shard in shards:
        with Writer(folder / shard.name, shard.entries) as writer:
            for name in shard.entries:
                writer.write(name, arrays[name].tobytes())
    write_index(folder, shards)
    return shards


def test_shards_and_index_are_named_as_transformers_does(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    shards = _write_shards(tmp_path, arrays, "2KB")
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    folder = HfFolder(tmp_path)
    assert index["weight_map"] == {name: folder.extent(name)[0].name for name in arrays}
    assert all(bytes(folder.read(name).data) == array.tobytes() for name, array in arrays.items())


def test_one_file_has_no_index(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert [shard.name for shard in _write_shards(tmp_path, arrays, "5GB")] == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_sharded_folder_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megabatch.converters.families import family_named

    family = family_named("qwen3")
    shape = family.shape({
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 32,
    })  # fmt: skip
    arrays = {name: RNG.standard_normal(dims).astype(np.float32) for name, dims in family.hf_tensors(shape).items()}
    assert len(_write_shards(tmp_path, arrays, "4KB")) > 2
    (tmp_path / "config.json").write_text(json.dumps(family.hf_config(shape)))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(np.array_equal(value.numpy(), arrays[name]) for name, value in model.state_dict().items())
