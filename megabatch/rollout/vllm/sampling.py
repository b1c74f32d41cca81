"""A request in vLLM's words, for a server and for an engine inside the ranks."""

from __future__ import annotations

from typing import Any

from megabatch.rollout.engine import Finish, Request

FINISH: dict[str | None, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}
"""By vLLM's `finish_reason`."""


def sampling_values(request: Request) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`, which are also fields of its completions endpoint."""
    sampling = request.sampling
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "seed": request.seed % 2**63,
        "logprobs": 0,
    }
