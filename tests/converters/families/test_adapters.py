"""Adapters of every layer of every family: there and back byte for byte, and merged on both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from safetensors.numpy import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]
RANK, ALPHA = 2, 6


@pytest.fixture(params=[name for name in CASES if name != "qwen3-vl-moe"])
def case(request: pytest.FixtureRequest) -> str:
    """Each case in turn whose adapters can be converted."""
    name: str = request.param
    return name


def test_experts_of_two_layouts_under_one_name_are_refused(saved: Saved, tmp_path: Path) -> None:
    adapter_of(saved("qwen3-vl-moe"), tmp_path / "adapter")
    with pytest.raises(ConversionError, match="its experts have two layouts under one name"):
        convert(
            ConversionRequest(to_mcore=True, model=saved("qwen3-vl-moe"), adapters=[tmp_path / "adapter"]),
            output_dir=tmp_path / "out",
        )


def adapter_of(base: Path, folder: Path, *, whole: str = "") -> dict[str, str]:
    """Writes an adapter of every matrix that is a layer or an embedding, all with A of their own, and returns their
    modules with what the names of A and B begin with. `whole`: the leaf of modules that are brought whole instead."""
    random, model = np.random.default_rng(0), open_hf_model(base)
    sizes = {piece.hf for mapped in model.tensors for piece in mapped.pieces}
    adapted: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(sizes):
        shape = model.folder.info(name).shape
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}."
        if whole and module.endswith(f".{whole}"):
            tensors[prefix + "weight"] = random.standard_normal(shape, np.float32)
        elif len(shape) == 2 and name.endswith(".weight"):
            rows, columns = shape
            embedding = module.endswith("embed_tokens")
            side = "lora_embedding_{}" if embedding else "lora_{}.weight"
            adapted[module] = prefix + side
            a, b = (rows, columns) if embedding else (columns, rows)
            tensors[adapted[module].format("A")] = random.standard_normal((RANK, a), np.float32)
            tensors[adapted[module].format("B")] = random.standard_normal((b, RANK), np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(adapted)}
    if whole:
        config["modules_to_save"] = [whole]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted


def test_there_and_back_again(case: str, saved: Saved, tmp_path: Path) -> None:
    adapter_of(saved(case), tmp_path / "adapter")
    convert(
        ConversionRequest(to_mcore=True, model=saved(case), adapters=[tmp_path / "adapter"]),
        output_dir=tmp_path / "mcore",
        verify=True,
    )
    for key in TorchDistFolder(tmp_path / "mcore" / "release").entries:
        assert key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")), key
    convert(ConversionRequest(to_hf=True, adapters=[tmp_path / "mcore"]), output_dir=tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes(), name


def test_merged_weights_are_the_sums(case: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(case), tmp_path / "adapter"
    adapted = adapter_of(base, adapter)
    convert(ConversionRequest(to_hf=True, model=base, adapters=[adapter], merge_lora=True), output_dir=tmp_path / "hf")
    convert(
        ConversionRequest(to_mcore=True, model=base, adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "mcore",
    )
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", model=tmp_path / "hf"),
        output_dir=tmp_path / "back",
    )
    before, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    direct, through = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert direct.keys() == through.keys()
    for name, found in direct.items():
        assert abs(through[name] - found).max() <= 1e-5, name
        module = name.removesuffix(".weight")
        if module in adapted:
            a, b = (lora[adapted[module].format(side)].astype(np.float64) for side in "AB")
            added = (b @ a).T if "embedding" in adapted[module] else b @ a
            assert abs(found - (before[name] + ALPHA / RANK * added)).max() <= 1e-4, name


@pytest.mark.parametrize("whole", ["in_proj_qkvz", "conv1d", "in_proj_ba"])
def test_a_layer_in_parts_is_brought_whole(whole: str, saved: Saved, tmp_path: Path) -> None:
    """Linear attention's projection is six tensors of a checkpoint, made of two of Hugging Face's."""
    base = saved("qwen3-next")
    adapter_of(base, tmp_path / "adapter", whole=whole)
    convert(
        ConversionRequest(to_mcore=True, model=base, adapters=[tmp_path / "adapter"]), output_dir=tmp_path / "mcore"
    )
    keys = TorchDistFolder(tmp_path / "mcore" / "release").entries
    parts = {"in_proj_ba": "in_proj.weight.beta", "conv1d": "conv1d.weight.key"}.get(whole, "in_proj.weight.z")
    assert f"decoder.layers.0.self_attention.{parts}" in keys
    convert(ConversionRequest(to_hf=True, adapters=[tmp_path / "mcore"]), output_dir=tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes(), name
