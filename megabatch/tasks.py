"""Every task of the trainer: how a recipe names it, and what it fixes for config, data and help. One table.

Nothing else asks which task a recipe has: what differs between tasks is a field here, or a module of the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    """What it is called everywhere; for `task="rlhf"` also the recipe's group with its parameters."""
    task: Literal["pt", "sft", "rlhf"]
    """`task`, `rlhf_type` and `task_type` are how a recipe says it; None: any."""
    rlhf_type: str | None = None
    task_type: str = "causal_lm"
    rows: Literal["documents", "conversations"] = "conversations"
    """What a row of the data is: a plain text whose end is learned too, or turns that a chat template renders."""
    loss_scale: Literal["default", "last_round", "all"] = "default"
    """Default of `data.loss_scale`."""
    truncation_strategy: Literal["delete", "left"] = "delete"
    """Default of `data.truncation_strategy`."""
    calculate_per_token_loss: bool = True
    """Default of `training.calculate_per_token_loss`."""
    streams: bool = False
    """Whether it can draw from a stream of rows (`data.streaming`)."""
    built: bool = False
    """Whether the trainer has it."""


def _rlhf(name: str, *, truncation_strategy: Literal["delete", "left"] = "delete") -> Task:
    return Task(
        name=name,
        task="rlhf",
        rlhf_type=name,
        loss_scale="last_round",
        truncation_strategy=truncation_strategy,
        calculate_per_token_loss=False,
    )


def _head(task_type: str) -> Task:
    return Task(name=task_type, task="sft", task_type=task_type, calculate_per_token_loss=False)


TASKS = (
    Task(name="pt", task="pt", rows="documents", loss_scale="all", streams=True, built=True),
    Task(name="sft", task="sft", streams=True, built=True),
    _rlhf("dpo"),
    _rlhf("kto"),
    _rlhf("rm"),
    _rlhf("gkd"),
    _rlhf("grpo", truncation_strategy="left"),
    _head("seq_cls"),
    _head("embedding"),
    _head("reranker"),
    _head("generative_reranker"),
)


def find_task(task: str, *, rlhf_type: str, task_type: str = "causal_lm") -> Task | None:
    """The task that a recipe with these values has; None for a combination that is none."""
    for one in TASKS:
        if one.task == task and one.rlhf_type in (None, rlhf_type) and one.task_type == task_type:
            return one
    return None
