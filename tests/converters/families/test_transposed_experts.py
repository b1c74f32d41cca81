"""Qwen3-VL-MoE: experts published transposed, and saved by transformers 5 as it has them in memory, under one name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megabatch.converters import ConversionRequest, convert
from megabatch.errors import ConversionError

IDS = [[5, 17, 20, 3, 59, 4, 4, 25, 40, 41, 42]]


@pytest.fixture
def published(saved: Callable[[str], Path]) -> Path:
    return saved("qwen3-vl-moe")


def logits(kind: str, folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(IDS)).logits[0].numpy()
    return found


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_the_language_part_is_the_text_model_of_transformers(published: Path, tmp_path: Path) -> None:
    """megatron-core's tensors, written as a Qwen3-MoE folder, compute what the model that sees images does of text."""
    config = json.loads((published / "config.json").read_text())
    text = {**config["text_config"], "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    text |= {"norm_topk_prob": True, "tie_word_embeddings": False}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(text))
    convert(ConversionRequest(to_mcore=True, model=published), output_dir=tmp_path / "mcore", verify=True)
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", model=tmp_path / "text"),
        output_dir=tmp_path / "qwen3-moe",
    )
    expected = logits("Qwen3VLMoeForConditionalGeneration", published)
    assert float(np.abs(expected).max()) > 1
    np.testing.assert_allclose(logits("Qwen3MoeForCausalLM", tmp_path / "qwen3-moe"), expected, rtol=1e-5, atol=1e-4)


def test_both_layouts_are_read_and_written(published: Path, tmp_path: Path) -> None:
    from transformers import Qwen3VLMoeForConditionalGeneration

    Qwen3VLMoeForConditionalGeneration.from_pretrained(published).save_pretrained(tmp_path / "saved")
    memory = tmp_path / "saved"
    shapes = [load_file(at / "model.safetensors")[NAME].shape for at in (published, memory)]
    assert shapes in ([(3, 24, 28), (3, 28, 24)], [(3, 24, 28), (3, 24, 28)])
    convert(
        ConversionRequest(to_hf=True, model=published, expert_layout="fused"),
        output_dir=tmp_path / "fused",
        verify=True,
    )
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "fused", torch_dtype="float32"),
        output_dir=tmp_path / "again",
        verify=True,
    )
    assert same_weights(published, tmp_path / "again")
    turned = load_file(tmp_path / "fused" / "model.safetensors")[NAME]
    assert np.array_equal(turned, load_file(published / "model.safetensors")[NAME].swapaxes(1, 2))
    for number, folder in enumerate((published, tmp_path / "fused", memory)):
        convert(ConversionRequest(to_mcore=True, model=folder), output_dir=tmp_path / f"mcore-{number}")
    first, *others = (sorted((tmp_path / f"mcore-{number}" / "release").glob("*.distcp")) for number in range(3))
    for other in others:
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in other]
    back, mcore = tmp_path / "back", tmp_path / "mcore-0"
    with pytest.raises(ConversionError, match=r"its other parts are not in the checkpoint; name .* as --model"):
        convert(ConversionRequest(to_hf=True, mcore_model=mcore, expert_layout="fused"), output_dir=back)
    convert(ConversionRequest(to_hf=True, mcore_model=mcore, model=published, expert_layout="fused"), output_dir=back)
    assert same_weights(tmp_path / "fused", tmp_path / "back")


NAME = "model.language_model.layers.0.mlp.experts.gate_up_proj"


def test_what_it_cannot_be_is_refused(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConversionError, match="has fused experts only"):
        convert(ConversionRequest(to_hf=True, model=published, expert_layout="per_expert"), output_dir=out)
    with pytest.raises(ConversionError, match="not supported with fused experts"):
        convert(ConversionRequest(to_hf=True, model=published, fp8_quantise=True), output_dir=out)
    with pytest.raises(ConversionError, match="adapters of Qwen3VLMoeForConditionalGeneration are not supported"):
        convert(
            ConversionRequest(to_mcore=True, model=published, adapters=[tmp_path], merge_lora=True), output_dir=out
        )
    assert not out.exists()
