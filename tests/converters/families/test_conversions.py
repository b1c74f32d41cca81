"""Whole folders of every family: to megatron-core's files, as its own loader reads them, and back, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import by_hand
import pytest
from cases import CASES
from safetensors.numpy import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.to_hf import to_hf
from megabatch.converters.to_mcore import to_mcore
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.keys import cell, stacks_layers
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


def test_a_folder_comes_back_byte_for_byte(case: str, saved: Saved, tmp_path: Path) -> None:
    to_mcore(saved(case), tmp_path / "mcore")
    to_hf(tmp_path / "mcore", saved(case), tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (saved(case), tmp_path / "hf"))
    assert after.keys() == before.keys()
    for name, array in before.items():
        if "linear_attn.norm" in name:  # one is taken away and added again, in float32
            assert abs(after[name] - array).max() <= 1e-7
        else:
            assert after[name].tobytes() == array.tobytes(), name


@pytest.mark.filterwarnings("ignore")
def test_torchs_reader_finds_every_tensor_as_made_by_hand(case: str, saved: Saved, tmp_path: Path) -> None:
    """What megatron-core reads through; the keys are stacked where it stacks layers, with experts behind."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    to_mcore(saved(case), tmp_path / "mcore")
    model = open_hf_model(saved(case))
    expected = CASES[case].expected(load_file(saved(case) / "model.safetensors"), model.shape)
    reader = FileSystemReader(tmp_path / "mcore")
    found = {
        key: torch.empty(entry.size)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load(found, storage_reader=reader, no_dist=True)
    places = {mapped: cell(mapped, model.shape, stacked=stacks_layers(model.shape)) for mapped in model.tensors}
    assert {place.key for place in places.values()} == set(found)
    for mapped, place in places.items():
        made = by_hand.Cut(expected[mapped.name, mapped.expert].parts, "rows").shard(0, 1)
        assert torch.equal(found[place.key][place.lead], torch.from_numpy(made.copy())), mapped.name


@pytest.mark.parametrize("left_out", [["embed_tokens"], ["shared_head.head"], ["embed_tokens", "shared_head.head"]])
@pytest.mark.parametrize("case", ["deepseek-v3-mtp", "glm4-moe-tied-mtp"])
@pytest.mark.parametrize("named", [True, False])
def test_copies_that_the_source_lacks_are_not_written(
    case: str, left_out: list[str], named: bool, saved: Saved, tmp_path: Path
) -> None:
    """Known from the folder that is named as --model, or else from the checkpoint's manifest."""
    source, weights = tmp_path / "source", load_file(saved(case) / "model.safetensors")
    layer = open_hf_model(saved(case)).shape.num_layers
    for name in left_out:
        del weights[f"model.layers.{layer}.{name}.weight"]
    source.mkdir()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((saved(case) / "config.json").read_bytes())
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    reference = {"model": source} if named else {}
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", **reference), output_dir=tmp_path / "hf")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == weights.keys()
    assert all(after[name].tobytes() == array.tobytes() for name, array in weights.items())


def test_layers_that_are_alike_may_have_keys_of_their_own(saved: Saved, tmp_path: Path) -> None:
    """As megatron-core has them where `moe_layer_freq` is a list, be it of ones."""
    base = saved("mixtral")
    convert(
        ConversionRequest(to_mcore=True, model=base, layer_keys="per_layer"),
        output_dir=tmp_path / "mcore",
        verify=True,
    )
    entries = TorchDistFolder(tmp_path / "mcore" / "release").entries
    assert entries["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].size == (3, 80, 24)
    assert entries["decoder.layers.0.self_attention.linear_proj.weight"].size == (24, 60)
    assert not any(key.startswith("decoder.layers.mlp") for key in entries)
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "hf"))
    assert after.keys() == before.keys()
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())


def test_layers_that_differ_are_not_stacked(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="layer_keys=stacked: the layers of this Qwen3NextForCausalLM differ"):
        convert(
            ConversionRequest(to_mcore=True, model=saved("qwen3-next"), layer_keys="stacked"),
            output_dir=tmp_path / "mcore",
        )
