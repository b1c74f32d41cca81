"""The command line and environment of a vLLM server that a trainer can give weights to."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megabatch.rollout.vllm.engine_options import CPU_CACHE_BYTES, EngineOptions, engine_values, kernel_environment

MODEL = "policy"
"""Name of the served model."""


def server_arguments(options: EngineOptions, *, host: str = "0.0.0.0", port: int | None = None) -> list[str]:
    """Arguments of `python -m vllm.entrypoints.openai.api_server`. Args: port: None leaves it to vLLM."""
    values: dict[str, Any] = {
        "served_model_name": MODEL,
        "host": host,
        "port": port,
        "worker_extension_cls": "megabatch.rollout.vllm.worker.Extension",
        "weight_transfer_config": {"backend": "megabatch"},
        "middleware": "megabatch.rollout.vllm.serving.Guard",
        **engine_values(options),
    }
    return [word for name, value in values.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> Sequence[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def server_command(
    options: EngineOptions,
    more: Sequence[str] = (),
    *,
    host: str = "0.0.0.0",
    port: int | None = None,
    on_cpus: bool = False,
) -> list[str]:
    """Args: more: arguments for vLLM as they are."""
    words = [*server_arguments(options, host=host, port=port), *more]
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    if on_cpus and not names & {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}:
        words += _words("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    if on_cpus and not names & {"--enable-chunked-prefill", "--no-enable-chunked-prefill"}:
        # after a part of a prompt vLLM 0.32 takes back a draw of the request's generator; on CPUs it cannot, and ends
        words += _words("enable_chunked_prefill", False)
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def server_environment(environment: Mapping[str, str], *, dtype: str | None, on_cpus: bool) -> dict[str, str]:
    """The variables of a server. Args: environment: its caller's."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    more = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if on_cpus else {}
    # memory of layers that are loaded again in large pages: fewer have to be cleared and mapped
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if on_cpus else {}
    return {**kernel_environment(dtype), **pages, **environment, **found, **more}
