"""Small recipes, model folders and datasets on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megabatch import Batch, Data, Model, Recipe, Resources, Training

TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of this machine's caches reaches a test."""
    for name in ("HF_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "caches"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 20)
    return path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole Hugging Face folder of zeros, with a tokenizer file."""
    from megabatch.converters.families import family_of

    folder = tmp_path / "models" / "tiny-qwen3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "tokenizer.json").write_text("{}")
    family = family_of(TINY)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in family.hf_tensors(family.shape(TINY)).items():
        start, size = end, 4
        for dimension in shape:
            size *= dimension
        end = start + size
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder


@pytest.fixture
def recipe(dataset: Path, model_folder: Path) -> Recipe:
    return Recipe(
        name="tiny",
        task="sft",
        model=Model(model=str(model_folder)),
        data=Data(dataset=[str(dataset)], max_length=64),
        batch=Batch(micro_batch_size=1, global_batch_size=4),
        training=Training(train_iters=2),
        resources=Resources(nodes=1, gpus_per_node=2, time="1:00:00"),
    )
