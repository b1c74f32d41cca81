"""The settings that decide the tokens of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from megabatch.config.training import ProblemType
from megabatch.tasks import Rows
from megabatch.values import dataclass

Truncation = Literal["delete", "left", "right", "split", "raise"]
"""What happens to a sample longer than max_length: drop and count it, cut it at an end or into pieces, or an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """Every setting that decides the tokens of a sample; pickled to the tokenising processes."""

    tokenizer: Path
    """Folder of the tokenizer."""
    rows: Rows = "conversations"
    template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template, besides what rows say."""
    system: str | None = None
    columns: Mapping[str, str] | None = None
    preprocess: str | None = None
    """The user's own function from row to rows, `file.py:function`."""
    preprocess_timeout_s: float = 60.0
    """Seconds that it may take for a row."""
    max_length: int | None = None
    """In tokens; None for no limit."""
    truncation_strategy: Truncation = "delete"
    loss_scale: str = "default"
    """See `loss_scales`."""
    teachers: tuple[tuple[str, int], ...] = ()
    """Tags of rows, with the number of the teacher that each has; empty where there is at most one."""
    teacher_tag_key: str = ""
    """The column with the tag."""
    channels: bool = False
    """Whether samples keep the name in their row's column `channel`."""
    problem_type: ProblemType | None = None
    """Form of the labels, for rows that have one."""
    num_labels: int | None = None
    instruction: str = ""
    """What a generative reranker asks of documents, for rows that are asked about with yes or no."""
    step_separator: str = ""
    """Text after each step, for rows that have them."""
    mismatches: bool = False
    """Whether each labelled answer is followed by a mismatched one."""
    ref_log_probs: bool = False
    """Whether pairs keep the log-probabilities that their rows say a reference gave them."""
    sanitize_control_tokens: bool = True
    """Whether control tokens in the data are tokenised as plain text."""
    new_special_tokens: tuple[str, ...] = ()
    """Tokens that the run has added to its tokenizer, for the data to write."""

    def __post_init__(self) -> None:
        # Read-only views of a mapping can be neither pickled nor written as JSON.
        object.__setattr__(self, "columns", dict(self.columns or {}))
        object.__setattr__(self, "template_variables", dict(self.template_variables))
