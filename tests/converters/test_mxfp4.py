"""GPT-OSS as it is published, made plain: every number, and whole folders, as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megabatch.converters import ConversionRequest, convert
from megabatch.errors import ConversionError

Tensors = dict[str, torch.Tensor]
_CONFIG = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "num_local_experts": 3,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in MXFP4, as it is published, and in BF16, as transformers makes that plain."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("oss")
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**_CONFIG)).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "plain")
    config = json.loads((root / "plain" / "config.json").read_text()) | {"quantization_config": _METHOD}
    (root / "packed").mkdir()
    (root / "packed" / "config.json").write_text(json.dumps(config))
    plain = load_file(root / "plain" / "model.safetensors")
    packed: Tensors = {}
    for name, tensor in list(plain.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
        assert plain[name].shape == tensor.shape
    save_file(plain, root / "plain" / "model.safetensors", {"format": "pt"})
    save_file(packed, root / "packed" / "model.safetensors", {"format": "pt"})
    return root / "packed", root / "plain"


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_megatron_cores_weights_are_those_of_the_plain_folder(
    dtype: str | None, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for folder in folders:
        convert(
            ConversionRequest(to_mcore=True, model=folder, torch_dtype=dtype),
            output_dir=tmp_path / folder.name,
            verify=True,
        )
    first, second = (sorted((tmp_path / folder.name / "release").glob("*.distcp")) for folder in folders)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "quantization_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())


def test_a_folder_is_written_plain(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    convert(
        ConversionRequest(to_hf=True, model=packed, torch_dtype="bfloat16"), output_dir=tmp_path / "hf", verify=True
    )
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    convert(ConversionRequest(to_mcore=True, model=packed), output_dir=tmp_path / "mcore")
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", model=packed), output_dir=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_transformers_loads_the_same_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """It makes the packed folder plain itself."""
    convert(ConversionRequest(to_hf=True, model=folders[0], torch_dtype="bfloat16"), output_dir=tmp_path / "hf")
    asked = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0], quantization_config=asked, dtype=torch.bfloat16, device_map="cpu"
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_every_power_and_every_number(tmp_path: Path) -> None:
    """All 256 powers with all 16 numbers, as transformers multiplies them."""
    from megabatch.converters.mxfp4 import _pairs

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)[None]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0].T.contiguous().view(torch.int16)
    found = torch.from_numpy(_pairs().view("int16").copy()).reshape(256, 512)
    number = ~expected.view(torch.bfloat16).isnan()
    assert torch.equal(found[number], expected[number])
    assert found.view(torch.bfloat16)[~number].isnan().all()


def no_scales(tensors: Tensors) -> None:
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]


def short_scales(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.experts.down_proj_scales"] = torch.ones(3, 64, 2, dtype=torch.uint8)


def other_blocks(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    tensors[name] = tensors[name].reshape(3, 64, 4, 8)


def no_blocks(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_scales, "down_proj_blocks .*: model.layers.0.mlp.experts.down_proj_scales is missing"),
        (short_scales, r"down_proj_scales \[3, 64, 2\] U8: \[3, 64, 1\] U8 is needed"),
        (other_blocks, r"gate_up_proj_blocks \[3, 64, 4, 8\] U8: U8 in blocks of 16 bytes is needed"),
        (no_blocks, r"model.layers.1.mlp.experts.gate_up_proj \[3, 64, 64\] is missing"),
    ],
)
def test_blocks_and_scales_that_do_not_fit(
    change: Callable[[Tensors], None], message: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors, folder = load_file(folders[0] / "model.safetensors"), tmp_path / "hf"
    folder.mkdir()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    with pytest.raises(ConversionError, match=message):
        convert(ConversionRequest(to_mcore=True, model=folder), output_dir=tmp_path / "out")
