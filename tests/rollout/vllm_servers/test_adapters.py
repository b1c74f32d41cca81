"""Adapters alone to a real vLLM server: what is sent, that the server computes with it, and a server without room."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rank_server import RankServer
from vllm_python import NEEDS_VLLM
from vllm_server import TOKEN, VOCAB, Running, requests, start

from megabatch import Model, MoE
from megabatch.config.grpo import Rollout
from megabatch.slurm.ports import free_port_block

pytestmark = NEEDS_VLLM
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 16, "target_modules": ["all-linear"]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    found = start(folder, free_port_block(), lora_rank=8)
    yield found
    found.stop()


def updated(run_dir: str, url: str) -> dict[str, Any]:
    """Three updates, before the last of which the server lost what it had: their metrics, how often the weights below
    the adapter were sent, and completions."""
    from megabatch.config.run import RunConfig
    from megabatch.rollout.vllm.server import Server
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    os.environ["MEGABATCH_ROLE_TOKEN"] = TOKEN
    begin, begun, put, sent = Server.begin_update, [], Server.put, []

    def counted(self: Any, version: int) -> None:
        begun.append(version)
        begin(self, version)

    def weighed(self: Any, bucket: Any) -> None:
        sent.append(len(bucket.data))
        put(self, bucket)

    Server.begin_update, Server.put = counted, weighed  # type: ignore[method-assign]
    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        rollouts = open_rollouts(run, source, ranks)
        rollouts._bucket_bytes = 20_000
        found: dict[str, Any] = {"differences": [], "bytes": []}
        for version in (1, 2, 3):
            _draw(engine.model, version)
            if version == 3 and ranks.is_main:
                rollouts._mine._servers[0].client.post("/update_weight_version", {"new_version": "default"})
            sent.clear()
            metrics = rollouts.update(engine, version)
            found["differences"].append(metrics["sync_max_logp_difference"].value)
            found["bytes"].append(sum(sent))
        found["completions"] = rollouts.generate(requests())
        rollouts.close()
    return {**found, "bases": begun}


def _draw(model: Any, version: int) -> None:
    with torch.no_grad():
        for chunk in model.chunks:
            for name, parameter in chunk.named_parameters():
                if ".lora." in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {version}".encode()))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_a_server_gets_adapters_alone(dense: Running, ranks: RankServer, tmp_path: Path) -> None:
    server = dense.server()
    server.wait()
    made = replace(
        runs.recipe(tmp_path, resources={"tasks_per_node": 2}, data={"max_length": 80}, tuner=LORA,
                    parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        model=Model(model=str(dense.folder), torch_dtype="float32"),
        moe=MoE(),
    )  # fmt: skip
    rollout = Rollout(
        vllm_mode="server", vllm_server_base_url=server.url, max_completion_length=16, vllm_enable_lora=True
    )
    made = runs.generating(made, rollout)
    main, other = ranks.run(updated, world_size=2, run_dir=str(runs.write_run(made, tmp_path / "run")), url=server.url)
    assert all(0 < difference < 1e-4 for difference in main["differences"])
    assert main["bases"] == [1, 3] and other["bases"] == []
    assert 0 < main["bytes"][1] < main["bytes"][0] / 4, "the second time the adapter alone"
    assert main["completions"] == other["completions"] and len(main["completions"]) == len(requests())
    large = replace(made, tuner=replace(made.tuner, lora_rank=16))
    with pytest.raises(RuntimeError, match=r"adapters of rank 8, the run's is 16; start it with --lora_rank 16 "):
        ranks.run(updated, world_size=2, run_dir=str(runs.write_run(large, tmp_path / "large")), url=server.url)
    server.close()
