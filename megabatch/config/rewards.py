"""How rewards of GRPO are computed, beside their names and weights in `grpo`."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass

JUDGE_PROMPT = """\
Judge how well an assistant answered. The conversation:

{prompt}

The assistant's answer:

{completion}

Say briefly what is right and wrong. End with a line `Score: N`, where N is a number from 0 (useless) to 1."""

StepAggregation = Literal["min", "product", "last", "mean"]

SHIPPED = ("accuracy", "format", "cosine", "repetition", "soft_overlong", "code", "judge")
"""Rewards that `reward_funcs` may name besides functions of users."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Processes that compute rewards."""

    reward_workers: int = param(4, at_least=1)
    """Processes beside rank 0 that compute rewards."""
    reward_model_device: Literal["auto", "cpu", "cuda"] = param("auto")
    """Where reward models compute: on the GPU of rank 0, which must have room for them, on the CPU, or on the former
    where there is one."""
    reward_step_aggregation: Literal["min", "product", "last", "mean"] = param("min")
    """How a process reward model (`rlhf_type` prm) rewards a completion by the probabilities that its steps are
    right."""
    reward_step_separator: str | None = param(None)
    """Text at which completions are cut into steps for a process reward model; None: `step_separator` of its
    config.json."""
    code_timeout_s: int = param(10, at_least=1)
    """Reward `code`: seconds of CPU time that a test may take, and half of its wall-clock time."""
    code_memory_mib: int = param(1024, at_least=64)
    """Reward `code`: memory of a test."""
    judge_base_url: str | None = param(None)
    """Reward `judge`: address of an OpenAI-compatible server up to `/v1`, or `role:NAME` for a server beside the
    ranks."""
    judge_model: str | None = param(None)
    """Reward `judge`: the model's name there."""
    judge_api_key_variable: str | None = param(None)
    """Reward `judge`: environment variable that holds the key; never the key itself."""
    judge_prompt: str = param(JUDGE_PROMPT)
    """Reward `judge`: what it is asked, with `{prompt}`, `{completion}` and the row's columns in braces. It must ask
    for a line `Score: N`."""
    judge_timeout_s: float = param(60.0, above=0)
    """Reward `judge`: seconds to wait for a reply."""
    judge_tries: int = param(4, at_least=1)
    """Reward `judge`: tries for each sample, with pauses of 1, 2, 4, … seconds."""
    judge_concurrency: int = param(16, at_least=1)
    """Reward `judge`: requests at a time."""
    reward_timeout_s: float = param(60.0, above=0)
    """Seconds that a call of a reward may take; its samples are then tried one by one, each with the same limit."""
