"""LoRA adapters of every linear layer merged into 1.4 GB of weights, against `cp -r` of the same bytes."""

from __future__ import annotations

import json
import os
import random
import tempfile
from array import array
from pathlib import Path

from files import MODEL, Way, compared, make
from measure import Figure, sized

LARGER = MODEL | {"num_hidden_layers": sized(36, 1)}
"""With more than 1 GB in its linear layers."""
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path) -> None:
    """Adapters with small random numbers, in bfloat16."""
    from megabatch.converters.bijection import TensorInfo
    from megabatch.converters.families import family_of
    from megabatch.converters.safetensors_io import Writer

    folder.mkdir()
    family = family_of(LARGER)
    entries: dict[str, TensorInfo] = {}
    for name, dims in family.hf_tensors(family.shape(LARGER)).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            entries[f"base_model.model.{module}.lora_A.weight"] = TensorInfo("BF16", (RANK, dims[1]))
            entries[f"base_model.model.{module}.lora_B.weight"] = TensorInfo("BF16", (dims[0], RANK))
    numbers = random.Random(0)
    block = array("H", (numbers.choice((0x3C00, 0xBC00)) + numbers.randrange(128) for _ in range(1 << 18))).tobytes()
    with Writer(folder / "adapter_model.safetensors", entries) as writer:
        for name, info in entries.items():
            writer.write(name, memoryview(block)[: 2 * info.shape[0] * info.shape[1]])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def lora() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        hf, lora = folder / "hf", folder / "lora"
        make(hf, quantised=False, model=LARGER)
        adapter(lora)
        flags = ["--merge_lora", "--adapters", str(lora), "--model", str(hf)]
        ways = (
            Way("LoRA into hf", hf, [*flags, "--to_hf"], 2.5, hf),
            Way("LoRA and hf to mcore", hf, [*flags, "--to_mcore"], 2.5, hf),
        )
        return [figure for way in ways for figure in compared(way, folder / "out", folder / "copy")]
