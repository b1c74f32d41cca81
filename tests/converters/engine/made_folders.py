"""Hugging Face folders of random bytes, made without torch, large enough to be interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.families import family_of
from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io import Writer, split_shards, write_index
from megabatch.converters.safetensors_io.header import ITEMSIZE

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 20, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": 210,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def make_folder(folder: Path, config: dict[str, Any], *, dtype: str = "BF16", max_shard_size: str = "200KB") -> Path:
    """A folder of a model whose weights are random bits, finite numbers all."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    family = family_of(plain)
    shapes = family.hf_tensors(family.shape(plain))
    files = split_shards({n: TensorInfo(dtype, d) for n, d in shapes.items()}, max_shard_size=max_shard_size)
    bits = random.Random(0)
    for file in files:
        with Writer(folder / file.name, file.entries) as writer:
            for name, info in file.entries.items():
                data = bytearray(bits.randbytes(elements(info.shape) * ITEMSIZE[dtype]))
                for at in range(ITEMSIZE[dtype] - 1, len(data), ITEMSIZE[dtype]):
                    data[at] &= 0xBF  # an exponent below the largest
                writer.write(name, data)
    write_index(folder, files)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
