"""A real vLLM server on this machine's CPUs, a model that it serves, and weights for it.

The reference is a model of transformers with the same weights.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import by_transformers
from vllm_python import python

from megabatch.rollout.bucket import Bucket, Part
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.turns.conversations import Conversation
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.command import server_command, server_environment
from megabatch.rollout.vllm.engine_options import EngineOptions
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server

VOCAB = 304
TOKEN = "a-token"
CPU = torch.device("cpu")
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAMPLINGS = [
    Sampling(temperature=1.0, max_tokens=8, stop_ids=()),
    Sampling(temperature=0.7, max_tokens=6, stop_ids=()),
    Sampling(temperature=1.1, top_k=20, top_p=0.9, repetition_penalty=1.2, max_tokens=8, stop_ids=()),
]


def made(seed: int) -> Any:
    """A mixture of experts with a dense layer, as vLLM's CPU kernels take it: heads of 32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True, tie_word_embeddings=False, mlp_only_layers=[0],
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """As a folder has them: each expert apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        for expert, one in enumerate(tensor if leaf in ("gate_up_proj", "down_proj") and "experts" in stem else []):
            parts = (
                {"down_proj": one}
                if leaf == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            )
            found |= {f"{stem}.{expert}.{part}.weight": value for part, value in parts.items()}
        if not (leaf in ("gate_up_proj", "down_proj") and "experts" in stem):
            found[name] = tensor
    return found


def buckets(model: Any, *, limit: int = 40_000) -> Iterator[Bucket]:
    """Small tensors together, and those larger than a bucket in pieces."""
    for name, tensor in tensors(model).items():
        data = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), limit):
            piece = data[start : start + limit]
            part = Part(name, "F32", tuple(tensor.shape), start, 0, len(piece))
            yield Bucket((part,), memoryview(piece))


@dataclass
class Running:
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def server(self) -> Server:
        client = Client(f"http://127.0.0.1:{self.port}", token=TOKEN, timeout_s=600)
        return Server(client, owner="test", device=CPU, timeout_s=600, concurrency=4)

    def revive(self) -> None:
        """Starts it again if it ended, as it does by tests that may have come before, in whatever order files come."""
        if self.process.poll() is not None:
            self.process = start(self.folder, self.port).process

    def stop(self) -> None:
        """Also of one that was stopped before."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(folder: Path, port: int, *, lora_rank: int | None = None) -> Running:
    more = {"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256, "distributed_executor_backend": "uni"}
    options = EngineOptions(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=96, max_num_seqs=8, more=more,
        lora_rank=lora_rank, lora_layers=LORA_LAYERS,
    )  # fmt: skip
    command = server_command(options, host="127.0.0.1", port=port, on_cpus=True)
    environment = {
        **server_environment(os.environ, dtype=options.dtype, on_cpus=True),
        "MEGABATCH_ROLE_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
    }
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            [python() or "", *command[1:]],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(folder, port, process)


def update(engine: Server | Pool, model: Any, version: int) -> None:
    engine.begin_update(version)
    for bucket in buckets(model):
        engine.put(bucket)
    engine.end_update()


def requests(count: int = 6) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    return [
        Request(
            key=f"0/{n}",
            prompt=tuple(torch.randint(3, VOCAB, (4 + n,), generator=generator).tolist()),
            sampling=SAMPLINGS[n % len(SAMPLINGS)],
            seed=100 + n,
        )
        for n in range(count)
    ]


def difference(request: Request, one: Completion | Conversation, models: Mapping[int, Any]) -> float:
    """The largest between a completion's log-probabilities and those of a full forward pass, of each token by the
    model of its version."""
    ids, places = [*request.prompt, *one.ids], range(len(request.prompt), len(request.prompt) + len(one.ids))
    worst = 0.0
    for version in set(one.versions):
        with torch.no_grad():
            logits_TV = models[version](torch.tensor([ids])).logits[0]
        for t, logp, made_by in zip(places, one.logps, one.versions, strict=True):
            if made_by == version:
                expected = by_transformers(logits_TV[t - 1], ids[:t], request.sampling)[ids[t]]
                worst = max(worst, abs(logp - expected.item()))
    return worst


def worst_difference(engine: Server | Pool, model: Any, version: int) -> float:
    """Between log-probabilities of completions, and of a full forward pass."""
    worst = 0.0
    for request, one in zip(requests(), engine.generate(requests()), strict=True):
        assert (one.key, one.finish, set(one.versions)) == (request.key, "length", {version})
        worst = max(worst, difference(request, one, {version: model}))
    return worst
