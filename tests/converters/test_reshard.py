"""A Hugging Face folder in other files: the same tensors to the last byte, of models that no table knows too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.command import main
from megabatch.converters.safetensors_io import HfFolder, Writer
from megabatch.errors import ConversionError

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from made_folders import MOE, make_folder


def same(one: Path, other: Path) -> None:
    with HfFolder(one) as first, HfFolder(other) as second:
        assert sorted(first.names) == sorted(second.names)
        for name in first.names:
            assert first.read(name) == second.read(name), name
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


@pytest.mark.parametrize("form", [{"fp8_quantise": True}, {"expert_layout": "fused"}])
def test_fp8_and_fused_experts_stay_what_they_are(form: dict[str, object], tmp_path: Path) -> None:
    convert(
        ConversionRequest(to_hf=True, model=make_folder(tmp_path / "hf", MOE), **form), output_dir=tmp_path / "form"
    )  # type: ignore[arg-type]
    out = tmp_path / "out"
    given = ["--to_hf", "--model", str(tmp_path / "form"), "--output_dir", str(out), "--max_shard_size", "40KB"]
    assert main([*given, "--verify"]) == 0
    same(out, tmp_path / "form")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 5
    largest = max(HfFolder(out).extent(name)[2] for name in HfFolder(out).names)
    assert max(path.stat().st_size for path in shards) < max(40_000, largest) + 4_000  # and its header
    assert main(["--verify", "--output_dir", str(out)]) == 0
    convert(ConversionRequest(to_hf=True, model=out, max_shard_size="5GB"), output_dir=tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    same(tmp_path / "back", tmp_path / "form")


def test_of_a_model_without_a_table(tmp_path: Path) -> None:
    """Quantised by another rule, in integers; a number and a tensor without any among them."""
    source = tmp_path / "other"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "other", "quantization_config": {"bits": 4}}))
    entries = {
        "qweight": TensorInfo("I32", (6, 10)), "scale": TensorInfo("F16", ()), "none": TensorInfo("F32", (0, 4)),
        "experts": TensorInfo("U8", (3, 5, 7)),
    }  # fmt: skip
    with Writer(source / "model.safetensors", entries) as writer:
        for name, size in (("qweight", 240), ("scale", 2), ("none", 0), ("experts", 105)):
            writer.write(name, bytes(range(size)))
    convert(ConversionRequest(to_hf=True, model=source, max_shard_size=250), output_dir=tmp_path / "out", verify=True)
    same(tmp_path / "out", source)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_size_that_is_none_and_a_folder_without_weights_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", MOE)
    for size in ("many", "0KB", 0):
        with pytest.raises(ConversionError, match=f"max_shard_size={size!r}"):
            convert(ConversionRequest(to_hf=True, model=source, max_shard_size=size), output_dir=tmp_path / "out")
    for path in source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConversionError, match="complete the download"):
        convert(ConversionRequest(to_hf=True, model=source, max_shard_size="1GB"), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
