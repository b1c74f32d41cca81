"""Pipes, devices and folders in place of files, files without end, sizes beyond any model: an error at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.regular_files import read_regular
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


UNUSUAL = {pipe: "it is a pipe", device: "it is a device", folder: "it is a folder", endless: "has 4398046511104"}


@pytest.fixture
def both(saved: Saved, tmp_path: Path) -> tuple[Path, Path]:
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    shutil.copytree(saved("qwen3"), hf)
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=mcore)
    return hf, mcore


@pytest.mark.parametrize("make", UNUSUAL)
@pytest.mark.parametrize(
    "name", ["hf/config.json", "hf/model.safetensors.index.json", "mcore/release/.metadata", "mcore/config.json",
             "mcore/release/metadata.json", "mcore/release/__0_0.distcp", "mcore/latest_checkpointed_iteration.txt"]
)  # fmt: skip
def test_what_is_no_file_of_bounded_size(
    name: str, make: Callable[[Path], None], both: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / name).unlink(missing_ok=True)
    if name.endswith(("config.json", "index.json")) and make not in (pipe, device, endless):
        pytest.skip("a folder is seen by its missing files")
    make(tmp_path / name)
    hf, mcore = both
    if name.endswith("index.json"):
        (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError) as error:
        if name.startswith("hf"):
            convert(ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "out")
        else:
            convert(ConversionRequest(to_hf=True, mcore_model=mcore), output_dir=tmp_path / "out")
    assert Path(name).parts[0] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_pipe_and_a_device_are_named(tmp_path: Path) -> None:
    for make, said in UNUSUAL.items():
        make(tmp_path / make.__name__)
        with pytest.raises(ConversionError, match=said):
            read_regular(tmp_path / make.__name__)
    with pytest.raises(ConversionError, match="No such file"):
        read_regular(tmp_path / "none")


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 10000"),
    ({"num_hidden_layers": 10**4000}, r"num_hidden_layers=10+\.\.\. must be at most"),
    ({"num_attention_heads": 10**8, "num_key_value_heads": 10**8}, "num_attention_heads=100000000 must be at most"),
    ({"num_hidden_layers": 9000, "num_attention_heads": 9000, "num_key_value_heads": 9000}, "exceed any real model"),
    ({"hidden_size": 1 << 40}, "hidden_size=1099511627776 must be at most"),
    ({"rms_norm_eps": 10**400}, r"rms_norm_eps=10+\.\.\. must be a positive number"),
    ({"architectures": {"a": 1}}, r"architectures=\{'a': 1\} must be a list of class names"),
    ({"architectures": "Qwen3ForCausalLM"}, r'must be a list of class names, such as \["Qwen3ForCausalLM"\]'),
    ({"architectures": [1]}, r"architectures=\[1\] must be a list"),
    ({"layer_types": 5}, "layer_types=5 must be a list of names"),
    ({"layer_types": [5]}, r"layer_types=\[5\] must be a list of names"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_sizes_and_types_of_no_model(changes: dict[str, Any], message: str, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("qwen3"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError, match=message):
        convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=tmp_path / "out")
