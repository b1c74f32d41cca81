"""Hugging Face → torch_dist → Hugging Face, with megatron-core's own reader and writer in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_state import NOT_STACKED, sharded_state

from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.to_hf import to_hf
from megabatch.converters.to_mcore import to_mcore
from megabatch.converters.torch_dist.folder import TorchDistFolder

Saved = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_bytes(back: Tensors, expected: Tensors) -> None:
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("limit", ["5GB", "6KB"])
def test_round_trip_is_bit_equal(case: str, limit: str, saved: Saved, tmp_path: Path) -> None:
    to_mcore(saved(case), tmp_path / "mcore")
    to_hf(tmp_path / "mcore", saved(case), tmp_path / "hf", max_shard_size=limit)
    assert_same_bytes(weights(tmp_path / "hf"), weights(saved(case)))
    config = [json.loads((folder / "config.json").read_text()) for folder in (saved(case), tmp_path / "hf")]
    assert config[0] == config[1]
    open_hf_model(tmp_path / "hf")


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_loads_it_strictly_at_any_split(
    case: str, tp: int, saved: Saved, tmp_path: Path, process_group: None
) -> None:
    from megatron.core import dist_checkpointing

    to_mcore(saved(case), tmp_path / "mcore")
    state, expected = sharded_state(saved(case), tp=tp, stacked=case not in NOT_STACKED)
    asked = {key for key in state if key.startswith("extra|")}
    loaded = dist_checkpointing.load(state, str(tmp_path / "mcore"), strict="raise_all")
    assert {key for key in loaded if key.startswith("extra|")} == asked
    for local, tensor in expected.items():
        got = loaded[local]
        assert torch.equal(torch.cat(got) if isinstance(got, list) else got, tensor), local


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_megatron_core_saved_at_any_split_goes_back(
    case: str, tp: int, saved: Saved, by_megatron: Path, tmp_path: Path
) -> None:
    to_hf(by_megatron / case / f"tp{tp}", saved(case), tmp_path / "hf")
    assert_same_bytes(weights(tmp_path / "hf"), weights(saved(case)))


def test_a_real_model_loads_ours_strictly_and_its_own_save_goes_back(
    case: str, saved: Saved, by_megatron: Path, tmp_path: Path
) -> None:
    to_hf(by_megatron / case / "model", saved(case), tmp_path / "hf")
    assert_same_bytes(weights(tmp_path / "hf"), weights(saved(case)))


def test_dtypes_and_layers_of_a_bf16_model(saved: Saved, tmp_path: Path) -> None:
    source = tmp_path / "bf16"
    source.mkdir()
    (source / "config.json").write_text((saved("qwen3-moe") / "config.json").read_text())
    halved = {name: tensor.bfloat16() for name, tensor in weights(saved("qwen3-moe")).items()}
    save_file(halved, source / "model.safetensors")
    to_mcore(source, tmp_path / "mcore")
    folder = TorchDistFolder(tmp_path / "mcore")
    assert {folder.dtype(key) for key in folder.entries} == {"BF16"}
    assert folder.entries["decoder.layers.mlp.experts.experts.linear_fc1.weight"].size == (2, 4, 24, 24)
    to_hf(tmp_path / "mcore", source, tmp_path / "hf")
    assert_same_bytes(weights(tmp_path / "hf"), halved)
