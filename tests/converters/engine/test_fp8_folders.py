"""Whole folders to block-scaled FP8 and back: equal to torch's, and what a round trip keeps to the last byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_reference import by_torch
from made_folders import MOE, make_folder
from safetensors.torch import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.quantised import DEEPSEEK_V3
from megabatch.errors import ConversionError

CONFIG: dict[str, Any] = {**MOE, "hidden_size": 192, "moe_intermediate_size": 160}
"""Sides that are no multiple of a block."""
Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def plain_folder(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    make_folder(folder, CONFIG, max_shard_size="1GB")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(value.shape, generator=generator) for name, value in weights(folder).items()}
    spread = {
        name: torch.exp2(torch.randint(-9, 4, value.shape, generator=generator)) for name, value in tensors.items()
    }
    save_file(
        {name: (value * spread[name]).to(dtype) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def fp8_folder(folder: Path, *, powers: bool = False) -> Path:
    """As DeepSeek's are made of weights in BF16."""
    plain_folder(folder)
    tensors = weights(folder)
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = by_torch(tensors[name], 128, 128, powers=powers)
    save_file(tensors, folder / "model.safetensors")
    how = DEEPSEEK_V3 | ({"scale_fmt": "ue8m0"} if powers else {})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": how}))
    return folder


def meant(tensors: Tensors) -> Tensors:
    """The values of a folder's tensors, scales applied."""
    values = {}
    for name, value in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            wide = scale.repeat_interleave(128, 0)[: value.shape[0]].repeat_interleave(128, 1)[:, : value.shape[1]]
            values[name] = value.float() * wide
    return values


def equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


def test_dequantised_and_quantised_again_a_folder_is_as_it_was(tmp_path: Path) -> None:
    source = fp8_folder(tmp_path / "fp8")
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", fp8_quantise=True),
        output_dir=tmp_path / "back",
        verify=True,
    )
    equal(weights(tmp_path / "back"), weights(source))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert before == after


def test_scales_that_are_powers_of_two_follow_the_folder_of_the_model(tmp_path: Path) -> None:
    """A block whose largest number was rounded down to 224 may come back at half the scale; no value changes."""
    source = fp8_folder(tmp_path / "fp8", powers=True)
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    given = {"mcore_model": tmp_path / "mcore", "model": source, "fp8_quantise": True}
    convert(ConversionRequest(to_hf=True, **given), output_dir=tmp_path / "back")
    back = weights(tmp_path / "back")
    scales = torch.cat([value.flatten() for name, value in back.items() if name.endswith("_scale_inv")])
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    expected, found = meant(weights(source)), meant(back)
    assert expected.keys() == found.keys()
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_plain_weights_a_folder_is_made_as_torch_makes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    source = plain_folder(tmp_path / "hf", dtype=dtype)
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", fp8_quantise=True), output_dir=tmp_path / "fp8"
    )
    expected = weights(source)
    for name in [name for name in expected if "_proj" in name]:
        expected[name], expected[f"{name}_scale_inv"] = by_torch(expected[name], 128, 128)
    equal(weights(tmp_path / "fp8"), expected)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == DEEPSEEK_V3
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_modules_that_the_model_leaves_plain_stay_plain(tmp_path: Path) -> None:
    source = plain_folder(tmp_path / "hf")
    how = {**DEEPSEEK_V3, "modules_to_not_convert": ["model.layers.1", "o_proj", "lm_head"]}
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    (source / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": how}))
    given = {"mcore_model": tmp_path / "mcore", "model": source, "fp8_quantise": True}
    convert(ConversionRequest(to_hf=True, **given), output_dir=tmp_path / "fp8")
    found = weights(tmp_path / "fp8")
    quantised = {name for name, value in found.items() if value.dtype == torch.float8_e4m3fn}
    assert quantised == {
        name for name in found if name.endswith("_proj.weight") and ".layers.1." not in name and "o_proj" not in name
    }
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.1", "o_proj", "lm_head", "model.layers.0.self_attn.o_proj"} < {
        *written["modules_to_not_convert"]
    }


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    source = plain_folder(tmp_path / "hf")
    tensors = weights(source)
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 7] = float("nan")
    save_file(tensors, source / "model.safetensors")
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    with pytest.raises(ConversionError, match=r"layers\.2\.self_attn\.k_proj\.weight.*infinities or NaN"):
        convert(
            ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", fp8_quantise=True),
            output_dir=tmp_path / "fp8",
        )
    assert not (tmp_path / "fp8").exists()
