"""Every task of the trainer: how a recipe names it, and what it fixes for config, data and help. One table.

No other code asks which task a recipe has: tasks differ by fields here and by modules of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from megabatch.values import dataclass

Rows = Literal[
    "documents", "conversations", "pairs", "judged", "labelled", "steps", "prompts", "ranked", "candidates", "yes_no"
]
"""What a row of the data is: plain text (its end is learned too), turns that a chat template renders, two
conversations with a preferred and a rejected answer, one whose answer is good or bad, a text or turns with a label, a
prompt with the steps of an answer and a label for each, a conversation to answer, a text with others that are like it
or not, or a query with documents that fit it or not, as conversations that end with the document or that ask about it.
`data.rows.kinds` reads each kind, and `data.tokens.encoder` encodes it."""

Example = Literal["arithmetic", "arithmetic_pairs", "arithmetic_labels", "arithmetic_steps", "arithmetic_ranked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    """Its name everywhere."""
    task: Literal["pt", "sft", "rlhf"]
    """The `task`, `rlhf_type` and `task_type` by which a recipe selects it; None matches any value."""
    rlhf_type: str | None = None
    task_type: str = "causal_lm"
    groups: Sequence[str] = ()
    """The groups of a recipe that it reads, of those whose parameters are for some tasks alone."""
    rows: Rows = "conversations"
    head: int | Literal["num_labels"] | None = None
    """Outputs of the head in place of the output layer: this many (0: the hidden states), or `training.num_labels`;
    None: the output layer."""
    scores_tokens: bool = False
    """Whether the head scores single tokens, as transformers' `…ForTokenClassification`, and not whole sequences."""
    loss_scale: Literal["default", "last_round", "all"] = "default"
    """Default of `data.loss_scale`."""
    truncation_strategy: Literal["delete", "left"] = "delete"
    """Default of `data.truncation_strategy`."""
    calculate_per_token_loss: bool = True
    """Default of `training.calculate_per_token_loss`."""
    example: Example = "arithmetic"
    """Dataset that megabatch generates with rows of this task (`data.rows.synthetic`)."""
    streams: bool = False
    """Whether it can draw from a stream of rows (`data.streaming`)."""
    built: bool = False
    """Whether the trainer implements it."""

    @property
    def generates(self) -> bool:
        """Whether it trains on completions that it generates itself."""
        return self.rows == "prompts"


_EXAMPLES: Mapping[Rows, Example] = {
    "conversations": "arithmetic",
    "pairs": "arithmetic_pairs",
    "judged": "arithmetic_labels",
    "labelled": "arithmetic_labels",
    "steps": "arithmetic_steps",
    "prompts": "arithmetic",
    "ranked": "arithmetic_ranked",
    "candidates": "arithmetic_ranked",
    "yes_no": "arithmetic_ranked",
}


def _rlhf(
    name: str,
    *,
    more_groups: Sequence[str] = (),
    rows: Rows = "conversations",
    truncation_strategy: Literal["delete", "left"] = "delete",
    streams: bool = False,
    built: bool = False,
    head: int | None = None,
    scores_tokens: bool = False,
) -> Task:
    return Task(
        name=name,
        task="rlhf",
        rlhf_type=name,
        groups=(name, *more_groups),
        rows=rows,
        example=_EXAMPLES[rows],
        loss_scale="last_round",
        truncation_strategy=truncation_strategy,
        calculate_per_token_loss=False,
        streams=streams,
        built=built,
        head=head,
        scores_tokens=scores_tokens,
    )


def _head(
    task_type: str,
    head: int | Literal["num_labels"] | None,
    *,
    groups: Sequence[str] = (),
    rows: Rows = "conversations",
    built: bool = False,
) -> Task:
    return Task(
        name=task_type,
        task="sft",
        task_type=task_type,
        calculate_per_token_loss=False,
        head=head,
        groups=groups,
        rows=rows,
        example=_EXAMPLES[rows],
        built=built,
    )


TASKS = (
    Task(name="pt", task="pt", rows="documents", loss_scale="all", streams=True, built=True),
    Task(name="sft", task="sft", streams=True, built=True),
    _rlhf("dpo", rows="pairs", streams=True, built=True),
    _rlhf("kto", rows="judged", streams=True, built=True),
    _rlhf("rm", rows="pairs", head=1, streams=True, built=True),
    _rlhf("prm", rows="steps", head=2, scores_tokens=True, streams=True, built=True),
    _rlhf("gkd", more_groups=("rollout",), streams=True, built=True),
    _rlhf("grpo", more_groups=("rewards", "rollout", "gkd"), rows="prompts", truncation_strategy="left", built=True),
    _head("seq_cls", "num_labels", rows="labelled", built=True),
    _head("embedding", 0, groups=("embedding",), rows="ranked", built=True),
    _head("reranker", 1, groups=("reranker",), rows="candidates", built=True),
    _head("generative_reranker", None, groups=("reranker",), rows="yes_no", built=True),
)


def find_task(task: str, *, rlhf_type: str, task_type: str = "causal_lm") -> Task | None:
    """The task that these recipe values select; None if no task has this combination."""
    for one in TASKS:
        if one.task == task and one.rlhf_type in (None, rlhf_type) and one.task_type == task_type:
            return one
    return None
