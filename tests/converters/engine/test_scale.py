"""Plans of a checkpoint with 10^12 parameters, from sparse files with real headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.conversion import make_plan
from megabatch.converters.families import family_of
from megabatch.converters.request import ConversionRequest
from megabatch.converters.safetensors_io import split_shards, write_index
from megabatch.converters.safetensors_io.header import build_header

KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
    "num_key_value_heads": 64, "n_shared_experts": 1, "n_routed_experts": 384, "routed_scaling_factor": 2.827,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": 163840, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 50000.0, "hidden_act": "silu",
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
PROGRAM = """
import sys, time
from megabatch.converters.conversion import make_plan
from megabatch.converters.request import ConversionRequest
started = time.process_time()
plan = make_plan(ConversionRequest(to_mcore=True, model=sys.argv[1]))
taken = time.process_time() - started
small = sum(len(file.make()) for file in plan.small)
# the rusage of a child begins with its parent's peak
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(len(plan.tensors), plan.tensor_file_bytes, small, taken, peak)
"""


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kimi-K2 in block-scaled FP8, all holes."""
    return _sparse(tmp_path_factory.mktemp("kimi"), KIMI_K2)


def _sparse(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    family = family_of(config)
    entries: dict[str, TensorInfo] = {}
    for name, dims in family.hf_tensors(family.shape(config)).items():
        entries[name] = TensorInfo("F32" if "correction_bias" in name else "BF16", dims)
        if name.endswith("proj.weight"):
            entries[name] = TensorInfo("F8_E4M3", dims)
            entries[f"{name}_scale_inv"] = TensorInfo("F32", tuple(-(-size // 128) for size in dims))
    shards = split_shards(entries, max_shard_size="17GB")
    for shard in shards:
        head, extents = build_header(shard.entries, metadata={"format": "pt"})
        with open(folder / shard.name, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(extent.size for extent in extents.values()))
    write_index(folder, shards)
    return folder


def test_a_trillion_parameters_are_planned_in_seconds_and_little_memory(kimi: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, kimi], capture_output=True, text=True, check=True)
    tensors, size, small, taken, peak = map(float, done.stdout.split())
    assert (tensors, size > 2e12, small > 1e7) == (46874, True, True)
    assert taken < 10
    assert peak < 300


def test_a_disk_that_is_too_small_is_known_before_a_byte_is_written(kimi: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megabatch.converters.command", "--to_mcore", "--model", kimi, "--output_dir"]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "disk full: 20" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_rank_among_many_gets_a_fair_share(tmp_path: Path) -> None:
    from megabatch.converters.engine.execute import share

    plan = make_plan(ConversionRequest(to_mcore=True, model=_sparse(tmp_path, {**KIMI_K2, "num_hidden_layers": 13})))
    sizes = [sum(plan.tensors[i].data_bytes for i in share(plan, rank=rank, world=64)) for rank in range(64)]
    assert max(sizes) < 1.1 * min(sizes)
