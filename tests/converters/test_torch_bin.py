"""`pytorch_model.bin`: refused unless asked for, read as data, equal to torch's own reading; malicious pickles."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.converters.torch_bin import read_bin
from megabatch.errors import ConversionError


def save_as_bin(source: Path, folder: Path, *, shards: int = 1) -> Path:
    """The weights of a folder as transformers 4 saved them."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    if shards == 1:
        torch.save(OrderedDict(state), folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        weight_map |= dict.fromkeys(names[shard::shards], file)
        torch.save({name: state[name] for name in names[shard::shards]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_those_of_the_safetensors(shards: int, saved: Any, tmp_path: Path) -> None:
    source = saved("qwen3-moe-tied")
    pickled = save_as_bin(source, tmp_path / "bin", shards=shards)
    convert(ConversionRequest(to_mcore=True, model=pickled, accept_bin=True), output_dir=tmp_path / "one", verify=True)
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "other")
    for name in ("release/.metadata", "release/__0_0.distcp", "release/__0_1.distcp"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_pickles_become_safetensors(saved: Any, tmp_path: Path) -> None:
    source = saved("qwen2-tied")
    pickled = save_as_bin(source, tmp_path / "bin", shards=2)
    convert(ConversionRequest(to_hf=True, model=pickled, accept_bin=True), output_dir=tmp_path / "out")
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_pickles_are_refused_unless_asked_for(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = save_as_bin(saved("qwen3"), tmp_path / "bin")
    arguments = ["--to_mcore", "--model", str(pickled), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "pickled weights (pytorch_model.bin)" in capsys.readouterr().err
    assert main([*arguments, "--accept_bin"]) == 0


def found(path: Path) -> dict[str, bytes]:
    raw = path.read_bytes()
    return {name: raw[extent.start : extent.start + extent.size] for name, extent in read_bin(path).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_lies_where_torch_reads_it(tmp_path: Path) -> None:
    whole = torch.randn(6, 5)
    state = OrderedDict(
        whole=whole,
        rows=whole[2:4],
        parameter=torch.nn.Parameter(torch.randn(3, 2)),
        half=torch.randn(7).half(),
        scalar=torch.tensor(2.5, dtype=torch.float64),
        numbers=torch.arange(5),
        flags=torch.tensor([True, False]),
        empty=torch.empty(0, 4),
        column=torch.randn(4, 4)[:, :1].contiguous().expand(4, 1),
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "x.bin")
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert found(tmp_path / "x.bin") == {name: bits(value) for name, value in loaded.items()}
    infos = {name: extent.info for name, extent in read_bin(tmp_path / "x.bin").items()}
    assert (infos["rows"].dtype, infos["rows"].shape) == ("F32", (2, 5))
    assert infos["numbers"].dtype == "I64"


def test_many_tensors_in_one_file(tmp_path: Path) -> None:
    """A directory and a pickle of more than a megabyte."""
    state = {f"model.layers.{i}.mlp.experts.{i}.gate_proj.weight": torch.full((2,), float(i)) for i in range(9000)}
    torch.save(state, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").stat().st_size > 2 << 20
    assert found(tmp_path / "x.bin") == {name: bits(value) for name, value in state.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.randn(4, 4).t()}, r"x\.bin: a: cannot be read as a range of bytes: .*not contiguous"),
        ({"a": torch.randn(1, 4).expand(3, 4)}, r"a: .*not contiguous"),
        ({"a": torch.randn(3).to_sparse()}, r"a: is what torch\._utils\._rebuild_sparse_tensor would have made"),
        ({"a": torch.randn(3, dtype=torch.complex64)}, r"a: .*ComplexFloatStorage"),
        ({"a": {"b": torch.randn(3)}}, r"a: is dict, not a plain tensor"),
        ({"a": 3}, r"a: is int, not a plain tensor"),
        ({3: torch.randn(3)}, r"a tensor whose name is int"),
        (torch.randn(3), r"holds what torch\._utils\._rebuild_tensor_v2 would have made, not tensors by name"),
        ({}, r"not tensors by name"),
    ],
)
def test_what_is_no_range_of_bytes_is_named(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(ConversionError, match=message):
        read_bin(tmp_path / "x.bin")


def test_the_format_before_zip_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"before torch 1\.6"):
        read_bin(tmp_path / "x.bin")


class Touch:
    """Touches a file when it is unpickled by anything that calls what a pickle names."""

    def __init__(self, path: Path, way: str) -> None:
        self.path, self.way = str(path), way

    def __reduce__(self) -> tuple[Any, ...]:
        if self.way == "eval":
            return eval, (f"open({self.path!r}, 'w')",)
        if self.way == "system":
            return os.system, (f"touch {self.path}",)
        return open, (self.path, "w")


@pytest.mark.parametrize("way", ["eval", "system", "open"])
@pytest.mark.parametrize("place", ["value", "key", "whole", "beside"])
def test_malicious_pickles_call_nothing(place: str, way: str, tmp_path: Path) -> None:
    evil = Touch(tmp_path / "touched", way)
    state: Any = {
        "value": {"a": evil}, "key": {(1, evil): torch.randn(3)}, "whole": evil,
        "beside": {"a": torch.randn(3), "z": [evil, [evil]]},
    }[place]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(state) if place != "beside" else pickled_beside(state))
        archive.writestr("x/data/0", bytes(12))
    with pytest.raises(ConversionError, match=r"not tensors by name|not a plain tensor|whose name is"):
        read_bin(tmp_path / "x.bin")
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "touched").exists()  # it would have been


def pickled_beside(state: dict[str, Any]) -> bytes:
    """Only the evil part, since tensors need torch's pickler."""
    return pickle.dumps({name: value for name, value in state.items() if not isinstance(value, torch.Tensor)})


def test_mutated_files_are_refused_or_read_inside_their_bounds(tmp_path: Path) -> None:
    torch.save({f"t{i}": torch.randn(5, 3) for i in range(4)}, tmp_path / "x.bin")
    original, rng, refused = (tmp_path / "x.bin").read_bytes(), random.Random(7), 0
    for _ in range(300):
        raw = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.bin").write_bytes(bytes(raw[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])]))
        try:
            for extent in read_bin(tmp_path / "x.bin").values():
                assert extent.start >= 0 and extent.start + extent.size <= len(raw)
        except ConversionError as error:
            assert "x.bin" in str(error)
            refused += 1
    assert refused > 50
