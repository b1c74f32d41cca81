"""Hugging Face folders in other forms: fused experts, block-scaled FP8; transformers must load them all alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabatch.converters import ConversionRequest, convert
from megabatch.errors import ConversionError

_SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
"""No side is more than a block and no multiple of it: transformers takes a block for rows / rows of scales."""
_LATENT = {
    "moe_intermediate_size": 128, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 14, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 8, "num_key_value_heads": 6, "head_dim": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_NEXT = {
    "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 14, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_GLM = {"moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "DeepseekV3": _LATENT,
    "Glm4Moe": _GLM,
    "Qwen3Next": _NEXT,
}
Logits = torch.Tensor


def save(folder: Path, prefix: str, changes: dict[str, Any], *, dtype: torch.dtype = torch.bfloat16) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**_SMALL | changes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(float(tensor.dim() == 1), 0.1 if tensor.dim() == 1 else 0.3)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as published
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> Logits:
    """As transformers loads the folder by itself, computed in float32."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert all(parameter.dtype.is_floating_point and parameter.element_size() > 1 for parameter in model.parameters())
    with torch.no_grad():
        return model.float()(torch.arange(24).view(2, 12) % 60).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in BF16 and its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = save(folder / "hf", request.param, FAMILIES[request.param])
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=folder / "mcore")
    return hf, folder / "mcore"


def test_transformers_loads_fused_experts_as_the_same_model(case: tuple[Path, Path], tmp_path: Path) -> None:
    hf, mcore = case
    convert(
        ConversionRequest(to_hf=True, mcore_model=mcore, expert_layout="fused"),
        output_dir=tmp_path / "fused",
        verify=True,
    )
    names = weights(tmp_path / "fused")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert not any(".experts.0." in name for name in names)
    assert torch.equal(logits_of(tmp_path / "fused"), logits_of(hf))
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "fused"), output_dir=tmp_path / "again")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "again", expert_layout="per_expert"),
        output_dir=tmp_path / "back",
    )
    before, after = weights(hf), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_transformers_loads_fp8_as_the_dequantised_model(case: tuple[Path, Path], tmp_path: Path) -> None:
    """Its FP8 loader dequantises on a CPU; ours, by way of a checkpoint, must give the same logits to the last bit."""
    _, mcore = case
    convert(ConversionRequest(to_hf=True, mcore_model=mcore, fp8_quantise=True), output_dir=tmp_path / "fp8")
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "fp8"), output_dir=tmp_path / "mcore")
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "plain")
    quantised = [name for name, value in weights(tmp_path / "fp8").items() if value.element_size() == 1]
    assert quantised
    assert torch.equal(logits_of(tmp_path / "fp8"), logits_of(tmp_path / "plain"))


def test_a_folder_is_written_anew_without_a_checkpoint_between(case: tuple[Path, Path], tmp_path: Path) -> None:
    hf, mcore = case
    for name, form in {"fused": {"expert_layout": "fused"}, "fp8": {"fp8_quantise": True}}.items():
        convert(ConversionRequest(to_hf=True, mcore_model=mcore, **form), output_dir=tmp_path / f"{name}-by-mcore")
        convert(ConversionRequest(to_hf=True, model=hf, **form), output_dir=tmp_path / name, verify=True)
        same(tmp_path / name, tmp_path / f"{name}-by-mcore")
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "fused", expert_layout="per_expert"),
        output_dir=tmp_path / "apart",
    )
    same(tmp_path / "apart", hf)
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "fp8"), output_dir=tmp_path / "mcore")
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "plain-by-mcore")
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "fp8", torch_dtype="bfloat16"), output_dir=tmp_path / "plain"
    )
    same(tmp_path / "plain", tmp_path / "plain-by-mcore")
    with pytest.raises(ConversionError, match="in block-scaled FP8 already"):
        convert(ConversionRequest(to_hf=True, model=tmp_path / "fp8", fp8_quantise=True), output_dir=tmp_path / "o")


def same(one: Path, other: Path) -> None:
    """Tensors and config.json; the order of names in a file may differ."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (one, other))
    assert first == second


def test_experts_that_are_not_there_or_never_apart_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "dense", "Qwen3", {})
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "dense"), output_dir=tmp_path / "dense-mcore")
    with pytest.raises(ConversionError, match=r"expert_layout=fused: Qwen3ForCausalLM has no experts"):
        convert(
            ConversionRequest(to_hf=True, mcore_model=tmp_path / "dense-mcore", expert_layout="fused"),
            output_dir=tmp_path / "o",
        )
    save(tmp_path / "oss", "GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2})
    convert(ConversionRequest(to_mcore=True, model=tmp_path / "oss"), output_dir=tmp_path / "oss-mcore")
    with pytest.raises(ConversionError, match=r"expert_layout=per_expert: GptOssForCausalLM has fused experts only"):
        convert(
            ConversionRequest(to_hf=True, mcore_model=tmp_path / "oss-mcore", expert_layout="per_expert"),
            output_dir=tmp_path / "o",
        )
    with pytest.raises(ConversionError, match=r"fp8_quantise: .* fused experts"):
        convert(
            ConversionRequest(to_hf=True, mcore_model=tmp_path / "oss-mcore", fp8_quantise=True),
            output_dir=tmp_path / "o",
        )
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "oss", expert_layout="fused"), output_dir=tmp_path / "oss-again"
    )
    same(tmp_path / "oss-again", tmp_path / "oss")
    assert not (tmp_path / "o").exists()
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "qwen3"
