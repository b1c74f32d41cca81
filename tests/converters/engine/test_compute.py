"""Casts and FP8 against torch, bit for bit, through whole conversions and over every pattern of bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_folders import MOE, make_folder
from safetensors.torch import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.engine.block_scaled import BlockScaled
from megabatch.converters.engine.compute import Computer
from megabatch.converters.engine.plan import Scales, SourceFile, Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io import HfFolder
from megabatch.errors import ConversionError

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def samples(dtype: str) -> torch.Tensor:
    """Every number of 16 bits; of the wider ones, random bits, ties between two numbers of 16 bits, and the ends."""
    if dtype in ("F16", "BF16"):
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[dtype])
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (200_001,), dtype=torch.int64, generator=generator)
    single = random.to(torch.int32).view(torch.float32)
    every = torch.arange(1 << 16, dtype=torch.int64)
    ties = ((every << 16) + 0x8000).to(torch.int32).view(torch.float32)
    halves = every.to(torch.int16).view(torch.float16).float()
    ends = torch.tensor([0.0, -0.0, 1e-45, 65504.0, 65519.9, 65520.0, 3.4e38, float("inf"), float("-inf")])
    tied_halves = (halves[:-1] + halves[1:]) / 2
    values = torch.cat([single, ties, halves, tied_halves, ends])
    return values if dtype == "F32" else torch.cat([values.double(), torch.randn(1000, dtype=torch.float64) * 1e30])


@pytest.mark.parametrize("target", TORCH)
@pytest.mark.parametrize("source", TORCH)
def test_casts_equal_torchs(source: str, target: str) -> None:
    values = samples(source)
    expected = values.float().to(TORCH[target])
    made = bytearray(expected.nbytes)
    Computer().cast(memoryview(bits_of(values)), source, target, out=memoryview(made))
    got = torch.frombuffer(made, dtype=TORCH[target])
    number = ~expected.isnan()
    assert bits_of(got[number]) == bits_of(expected[number])
    assert got[~number].isnan().all()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f32") / "hf"
    return make_folder(folder, {**MOE, "torch_dtype": "float32"}, dtype="F32", max_shard_size="1GB")


def weights(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_conversion_casts_on_the_way_there_or_back(name: str, single: Path, tmp_path: Path) -> None:
    convert(ConversionRequest(to_mcore=True, model=single, torch_dtype=name), output_dir=tmp_path / "cast")
    convert(ConversionRequest(to_mcore=True, model=single), output_dir=tmp_path / "plain")
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "cast"), output_dir=tmp_path / "one")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "plain", torch_dtype=name), output_dir=tmp_path / "other"
    )
    expected = {key: value.to(getattr(torch, name)) for key, value in weights(single).items()}
    for folder in (tmp_path / "one", tmp_path / "other"):
        found = weights(folder)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            assert bits_of(found[key]) == bits_of(value), key
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == name


def quantised(folder: Path, *, drop: str = "", scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """Makes `folder` as DeepSeek-V3's are, and returns what its weights mean."""
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = {**MOE, "hidden_size": 192, "moe_intermediate_size": 160, "quantization_config": how}
    make_folder(folder, config, max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    meant: Tensors = {}
    for name, value in list(tensors.items()):
        if "_proj" not in name:
            meant[name] = value
            continue
        bits = torch.randint(0, 256, value.shape, dtype=torch.uint8)
        bits[bits & 0x7F == 0x7F] = 3  # no NaN
        rows, columns = value.shape
        scale = (torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3).to(scale_dtype)
        tensors[name] = bits.view(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        factors = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        meant[name] = (tensors[name].float() * factors).bfloat16()
    tensors.pop(drop, None)
    save_file(tensors, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [None, "float32"])
def test_fp8_with_block_scales_equals_torchs_product(
    name: str | None, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    meant = quantised(tmp_path / "hf", scale_dtype=scale_dtype)
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=tmp_path / "mcore", verify=True)
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", torch_dtype=name), output_dir=tmp_path / "back"
    )
    found = weights(tmp_path / "back")
    assert found.keys() == meant.keys()
    for key, value in meant.items():
        assert bits_of(found[key]) == bits_of(value.float() if name else value), key
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == (name or "bfloat16")


SCALES = (1.0, 0.0, -0.75, 1e-4 / 448, 3.1e-39, 1e-45, 127.99, 128.0, 3e38, float("inf"), float("nan"), 2.0**-120)
# products with these lie half-way between two numbers of bfloat16
SCALES += (257 / 256 / 1024, 2.0**-7 * 259 / 256, -257 / 256 * 2.0**-100)


@pytest.mark.parametrize("name", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("nan", [True, False])
def test_every_fp8_byte_times_any_scale_equals_torchs_product(nan: bool, name: str, tmp_path: Path) -> None:
    """Rare scales stand in rows of blocks of their own beside usual ones, so that each way of computing is taken."""
    rng = torch.Generator().manual_seed(3)
    block, columns = (4, 256), 515
    scales = torch.rand(2 * len(SCALES) + 400, 3, generator=rng) * 2e-3
    scales[: len(SCALES), 1] = torch.tensor(SCALES)
    bits = torch.arange(256, dtype=torch.uint8).repeat(len(scales) * 4 * columns // 256 + 1)[
        : len(scales) * 4 * columns
    ]
    bits = bits.clone() if nan else bits.masked_fill(bits & 0x7F == 0x7F, 3)
    file = tmp_path / "scales"
    file.write_bytes(bits_of(scales))
    given = Scales(0, 0, "F32", 3, 6, block)  # as if six rows of the tensor lay before
    rows = len(scales) * 4 - 6
    raw = bits.view(-1, columns)[6:]
    expected = raw.view(torch.float8_e4m3fn).float()
    expected = (expected * scales.repeat_interleave(4, 0)[6:].repeat_interleave(256, 1)[:, :columns]).to(TORCH[name])
    width = expected.element_size() * columns
    strip = Strip(0, rows, 0, 0, 0, columns, given)
    tensor = Tensor("x", 0, 0, (rows, columns), name, "F8_E4M3", rows, width, columns, (strip,))
    made = bytearray(expected.nbytes)
    with Sources([SourceFile(file, file.stat().st_size, 0)]) as sources:
        scaled = BlockScaled(Computer(), sources)
        half = rows // 2 + 1
        for first, last in ((0, half), (half, rows)):
            part = memoryview(bits_of(raw[first:last]))
            scaled.dequantise(part, tensor, strip, first, out=memoryview(made)[first * width : last * width])
    got = torch.frombuffer(made, dtype=TORCH[name]).view(expected.shape)
    number = ~expected.isnan()
    assert number.any() and (nan or not number.all())
    assert bits_of(got[number]) == bits_of(expected[number])
    assert got[~number].isnan().all()


def test_fp8_is_rounded_once_when_it_becomes_single(tmp_path: Path) -> None:
    quantised(tmp_path / "hf")
    convert(
        ConversionRequest(to_mcore=True, model=tmp_path / "hf", torch_dtype="float32"), output_dir=tmp_path / "mcore"
    )
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "back")
    source, key = HfFolder(tmp_path / "hf"), "model.layers.0.self_attn.q_proj.weight"
    raw = torch.frombuffer(source.read(key).data, dtype=torch.uint8).view(torch.float8_e4m3fn).float().view(120, 192)
    scale = torch.frombuffer(source.read(f"{key}_scale_inv").data, dtype=torch.float32).view(1, 2)
    assert torch.equal(weights(tmp_path / "back")[key], raw * scale.repeat_interleave(128, 1)[:, :192])


def test_scales_that_are_missing_are_named(tmp_path: Path) -> None:
    lost = "model.layers.1.self_attn.k_proj.weight_scale_inv"
    quantised(tmp_path / "hf", drop=lost)
    with pytest.raises(ConversionError, match=f"{lost} is missing"):
        convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=tmp_path / "mcore")


def test_other_quantisations_are_refused_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", {**MOE, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ConversionError, match=r"quantization_config=.*gptq.* is not supported"):
        convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=tmp_path / "mcore")


def test_weights_that_are_quantised_are_not_taken_for_plain_ones(tmp_path: Path) -> None:
    """A folder whose config.json does not say that it is quantised."""
    quantised(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"_scale_inv .* is left over"):
        convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=tmp_path / "mcore")
