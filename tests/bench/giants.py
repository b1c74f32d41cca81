"""Planning to convert the largest open models: real headers and index, sparse files of which only headers are read."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import MIB, ROOT, Figure, environment, sized, status_kib

GIANTS: dict[str, dict[str, Any]] = {
    "Kimi-K2": {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 163840, "max_position_embeddings": 131072,
    },
    "Qwen3-480B": {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 6144, "intermediate_size": 8192,
        "moe_intermediate_size": 2560, "num_experts": 160, "num_experts_per_tok": 8, "num_hidden_layers": 62,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 262144,
    },
}  # fmt: skip


def make(config: dict[str, Any], folder: Path) -> None:
    """A folder of bfloat16 zeros that take no room."""
    from megabatch.converters.bijection import TensorInfo
    from megabatch.converters.families import family_of
    from megabatch.converters.safetensors_io import split_shards, write_index
    from megabatch.converters.safetensors_io.header import build_header

    family = family_of(config)
    entries = {name: TensorInfo("BF16", dims) for name, dims in family.hf_tensors(family.shape(config)).items()}
    shards = split_shards(entries, max_shard_size="20GB")
    for shard in shards:
        head, extents = build_header(shard.entries, metadata={"format": "pt"})
        with open(folder / shard.name, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(extent.size for extent in extents.values()))
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config))


def plan(folder: str) -> None:
    """Prints what planning cost this process; its imports are in it."""
    started = time.perf_counter()
    from megabatch.converters.to_mcore import plan_to_mcore

    made = plan_to_mcore(folder)
    seconds = time.perf_counter() - started
    peak = status_kib("VmHWM") / 1024  # ru_maxrss would count the process that started this one
    print(json.dumps({"s": seconds, "mib": peak, "tensors": len(made.tensors), "bytes": made.tensor_file_bytes}))


def giants() -> list[Figure]:
    """Seconds and peak memory of a process that plans."""
    figures = []
    for name, config in GIANTS.items():
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            make(config | sized({}, {"num_hidden_layers": 2}), Path(folder))
            command = [sys.executable, __file__, folder]
            done = subprocess.run(
                command, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True, check=True
            )
            cost = json.loads(done.stdout)
        note = f"{cost['tensors']} tensors, {cost['bytes'] / MIB / MIB:.2f} TiB"
        figures.append(Figure(name=f"plan {name}", value=cost["s"], unit="s", target=10, note=note))
        figures.append(Figure(name=f"plan {name}, peak memory", value=cost["mib"], unit="MiB", target=300))
    return figures


if __name__ == "__main__":
    plan(sys.argv[1])
