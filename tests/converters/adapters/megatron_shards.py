"""Adapters as megatron-core's layers hold them, fused by hand from PEFT's; run as a program, it saves and loads them.

Its process is adapted to the CPU for good, hence one of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

GROUPS = 2
Tensors = dict[str, torch.Tensor]
Found = tuple[str, tuple[tuple[int, int, int], ...], torch.Tensor, int | None]
"""Key, places in its leading dimensions, the tensor, and the dimension that tensor parallelism cuts."""


def fused(adapter: Path, config: dict[str, Any], *, padded: bool) -> Iterator[Found]:
    """Every tensor of the checkpoint; layers and experts are leading dimensions. `padded`: the vocabulary is."""
    given = load_file(adapter / "adapter_model.safetensors")
    yield from _ends(given, 4 if padded else 0)
    layers, experts = config["num_hidden_layers"], config.get("num_experts") or config.get("num_local_experts") or 0
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        at, name = (0, layer, layers), "decoder.layers."
        q, k, v = (own[f"self_attn.{x}_proj.lora_B.weight"].chunk(GROUPS) for x in "qkv")
        rows = torch.cat([part for group in zip(q, k, v, strict=True) for part in group])
        yield from _pair(f"{name}self_attention.linear_qkv", (at,), own["self_attn.q_proj.lora_A.weight"], rows, 0)
        yield from _pair(f"{name}self_attention.linear_proj", (at,), *_both(own, "self_attn.o_proj"), 1)
        if not experts:
            yield from _mlp(f"{name}mlp.", "mlp.", (at,), own)
            continue
        yield from _pair(f"{name}mlp.router", (at,), *_both(own, "mlp.gate"), None)
        for expert in range(experts):
            places = (at, (1, expert, experts))
            yield from _mlp(f"{name}mlp.experts.experts.", f"mlp.experts.{expert}.", places, own)


def _ends(given: Tensors, more: int) -> Iterator[Found]:
    """Embedding and output layer, whose own weights PEFT saves beside, with `more` rows of the vocabulary."""
    pad, prefix = torch.nn.functional.pad, "base_model.model."
    embedding, output = f"{prefix}model.embed_tokens.", f"{prefix}lm_head."
    if f"{output}lora_A.weight" not in given:
        return
    ours = "embedding.word_embeddings."
    yield f"{ours}lora_embedding_A", (), pad(given[f"{embedding}lora_embedding_A"], (0, more)), 1
    yield f"{ours}lora_embedding_B", (), given[f"{embedding}lora_embedding_B"], None
    yield f"{ours}weight", (), pad(given[f"{embedding}base_layer.weight"], (0, 0, 0, more)), 0
    rows = pad(given[f"{output}lora_B.weight"], (0, 0, 0, more))
    yield from _pair("output_layer", (), given[f"{output}lora_A.weight"], rows, 0)
    yield "output_layer.weight", (), pad(given[f"{output}base_layer.weight"], (0, 0, 0, more)), 0


def _both(own: Tensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]


def _mlp(name: str, theirs: str, places: tuple[tuple[int, int, int], ...], own: Tensors) -> Iterator[Found]:
    rows = torch.cat([own[f"{theirs}{x}_proj.lora_B.weight"] for x in ("gate", "up")])
    yield from _pair(f"{name}linear_fc1", places, own[f"{theirs}gate_proj.lora_A.weight"], rows, 0)
    yield from _pair(f"{name}linear_fc2", places, *_both(own, f"{theirs}down_proj"), 1)


def _pair(
    name: str, places: tuple[tuple[int, int, int], ...], a: torch.Tensor, b: torch.Tensor, cut: int | None
) -> Iterator[Found]:
    """A column-parallel layer cuts B's rows, a row-parallel one A's columns."""
    yield f"{name}.lora_A.weight", places, a, 1 if cut == 1 else None
    yield f"{name}.lora_B.weight", places, b, 0 if cut == 0 else None


def sharded(found: list[Found], *, blank: bool, spelled: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """What two tensor-parallel ranks hold, all in one process."""
    from megatron.core.dist_checkpointing import ShardedTensor

    state: dict[str, Any] = {}
    for name, places, whole, cut in found:
        key = name
        for ours, theirs in spelled:
            key = key.replace(ours, theirs)
        for rank, part in enumerate(whole.chunk(2, cut) if cut is not None else [whole]):
            offsets = [] if cut is None else [(len(places) + cut, rank, 2)]
            data = torch.full_like(part, 7.0) if blank else part.contiguous()
            state[f"{key}|{places}|{rank}"] = ShardedTensor.from_rank_offsets(
                key, data, *places, *offsets, prepend_axis_num=len(places)
            )
    return state


def main(jobs: list[list[str]]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from in_process_writer import use_in_process_writer

    from megabatch.trainer.megatron_cpu import adapt

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    adapt()
    use_in_process_writer()
    bridge = ((".lora_A.", ".adapter.linear_in."), (".lora_B.", ".adapter.linear_out."))
    for adapter, base, output in jobs:
        config = json.loads((Path(base) / "config.json").read_text())
        for name, spelled in (("tp2", ()), ("bridge", bridge)):
            (Path(output) / name).mkdir(parents=True)
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            found = list(fused(Path(adapter), config, padded=name == "tp2"))
            state = sharded(found, blank=False, spelled=spelled)
            dist_checkpointing.save(state, str(Path(output) / name), sharded_strategy=strategy)
        found = list(fused(Path(adapter), config, padded=False))
        # nested, because megatron-core puts the common state beside what was asked for
        asked = {"model": sharded(found, blank=True)}
        wanted = {name: part.data for name, part in sharded(found, blank=False).items()}
        loaded = dist_checkpointing.load(asked, str(Path(output) / "ours" / "release"), strict="raise_all")["model"]
        torch.save({name: [loaded[name], part] for name, part in wanted.items()}, Path(output) / "loaded.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
