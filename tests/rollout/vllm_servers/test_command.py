"""The command line of a server, and the middleware that guards its endpoints."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vllm_python import python

from megabatch.rollout.vllm.command import server_arguments, server_command, server_environment
from megabatch.rollout.vllm.engine_options import EngineOptions
from megabatch.rollout.vllm.guard import TOKEN, Guard


def test_arguments() -> None:
    options = EngineOptions(
        model="m", tensor_parallel_size=2, max_model_len=64, enable_prefix_caching=False,
        more={"max_loras": 2, "compilation_config": {"level": 0}, "seed": None},
    )  # fmt: skip
    words = " ".join(server_arguments(options, port=9))
    for part in (
        "--served-model-name policy --host 0.0.0.0 --port 9", "--model m --tensor-parallel-size 2 --max-model-len 64",
        "--no-enable-prefix-caching", "--logprobs-mode processed_logprobs", "--generation-config vllm",
        '--weight-transfer-config {"backend": "megabatch"}', '--max-loras 2 --compilation-config {"level": 0}',
    ):  # fmt: skip
        assert part in words, words
    adapts = EngineOptions(model="m", lora_rank=8, lora_layers=("q_proj", "o_proj"))
    assert "--enable-lora --max-loras 1 --max-lora-rank 8 --lora-target-modules q_proj o_proj" in " ".join(
        server_arguments(adapts)
    )
    assert "--dtype" not in words and "--enforce-eager" not in words and "--seed" not in words


def test_a_server_on_cpus_takes_a_bounded_cache_unless_told() -> None:
    cache = f"--kv-cache-memory-bytes {1 << 30}"
    assert cache in " ".join(server_command(EngineOptions(model="m"), on_cpus=True))
    assert cache not in " ".join(server_command(EngineOptions(model="m")))
    for options, more in (
        (EngineOptions(model="m", gpu_memory_utilization=0.3), []),
        (EngineOptions(model="m", more={"kv_cache_memory_bytes": 5}), []),
        (EngineOptions(model="m"), ["--kv_cache_memory_bytes=5"]),
    ):
        assert cache not in " ".join(server_command(options, more, on_cpus=True))


def test_a_server_on_cpus_computes_prompts_whole_unless_told() -> None:
    whole = "--no-enable-chunked-prefill"
    assert whole in server_command(EngineOptions(model="m"), on_cpus=True)
    assert whole not in server_command(EngineOptions(model="m"))
    assert whole not in server_command(EngineOptions(model="m"), ["--enable-chunked-prefill"], on_cpus=True)


def test_threads_of_cpus_are_left_to_the_cluster() -> None:
    assert "VLLM_CPU_OMP_THREADS_BIND" not in server_environment({}, dtype=None, on_cpus=False)
    assert server_environment({}, dtype=None, on_cpus=True)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_products_of_float32_are_exact_unless_told() -> None:
    name = "TRITON_F32_DEFAULT"
    assert server_environment({}, dtype="float32", on_cpus=False)[name] == "ieee"
    assert server_environment({name: "tf32"}, dtype="float32", on_cpus=False)[name] == "tf32"
    assert name not in server_environment({}, dtype="bfloat16", on_cpus=False)


@pytest.mark.skipif(python() is None, reason="needs vLLM for CPUs: make vllm")
def test_room_for_adapters_of_experts_is_refused_on_cpus(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    command = [str(python()), "-m", "megabatch.cli", "rollout", str(tmp_path), "--lora_rank", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not done.stdout
    assert f"--lora_rank is not for {tmp_path} on CPUs" in done.stderr and "leave it out" in done.stderr


@pytest.mark.parametrize(
    ("path", "given", "status"),
    [("/update_weights", None, 401), ("/update_weights", "wrong", 401), ("/v1/completions", "right", 200),
     ("/health", None, 200)],
)  # fmt: skip
def test_only_health_is_open(path: str, given: str | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "right")
    assert asked(path, given) == status
    monkeypatch.delenv(TOKEN)
    assert asked(path, given) == 200


def asked(path: str, token: str | None) -> int:
    """Status of the guarded application's answer."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    asyncio.run(Guard(app)({"type": "http", "path": path, "headers": headers}, None, send))
    return int(sent[0]["status"])
