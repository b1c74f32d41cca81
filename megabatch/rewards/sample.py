"""What rewards are given, and what a reward is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, Protocol, TypeAlias

from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSample:
    """One completion of one prompt."""

    key: str
    """Unique in a run: step/prompt/number. Samples whose keys differ only after the last slash are a group."""
    prompt: Sequence[Mapping[str, Any]]
    """The prompt's messages: role, content, and what else a turn says, such as `tool_calls`."""
    completion: str
    """The text, without special tokens."""
    ids: Sequence[int]
    """The completion's token ids, flat, over all turns; rewards of length count these."""
    truncated: bool = False
    """Whether the completion ended at the length limit."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""

    @property
    def for_templates(self) -> dict[str, Any]:
        """What a chat template is given besides messages: the row's functions, documents and own variables."""
        own = dict(self.columns.get("chat_template_kwargs") or {})
        return {name: self.columns.get(name) for name in ("tools", "documents")} | own

    @property
    def group(self) -> str:
        return self.key.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class NoReward:
    """Instead of a value: why a sample has no reward, where that is a failure."""

    reason: str


Score: TypeAlias = Callable[[Sequence[RewardSample]], Sequence[Any]]
"""One value for each sample: a number, None or NaN for no reward, or NoReward."""


Place: TypeAlias = Literal["here", "shared", "alone"]
"""Where a reward is computed: in the calling process (fast, and no code of others), in the processes that rewards
share, or in one of its own, which keeps what it has loaded."""


class Reward(Protocol):
    """A reward as it travels to the process that computes it: plain values, importable without torch."""

    @property
    def name(self) -> str:
        """Names its metrics."""
        ...

    @property
    def place(self) -> Place: ...

    def open(self) -> Score:
        """Loads what it needs, in the process that scores; called once there.

        Raises: ConfigError if it cannot be used.
        """
        ...
