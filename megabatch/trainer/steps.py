"""Where optimizer steps come from: the contract between the loop and a task's source of batches.

A source may draw from a dataset, or generate, reward and pack inside `next`. The loop does not care: it saves the
cursor of the last step and passes it back when the run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.pack import Pack
from megabatch.trainer.sums import Ratio

if TYPE_CHECKING:
    from torch import Tensor

    from megabatch.trainer.engine import Engine

State = Mapping[str, Any]
"""Everything that determines the next step, as JSON; `{}` at the start of a run. Only the source that made it reads
it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step, or one batch of an evaluation. All but `packs` is the same on every rank."""

    packs: list[Pack]
    """This rank's micro-batches; all ranks of a model replica get the same."""
    totals: Mapping[Norm, float]
    """Denominators of the global batch, known without a reduction."""
    filled: int
    """Micro-batches of the global batch that hold samples, on all data-parallel ranks; at least 1."""
    tokens: int
    """Tokens of the global batch, without padding."""
    samples: int
    """Samples of the global batch."""
    mean_length: float
    """Average over tokens of the length of their sequence: sum of squared lengths / sum of lengths."""
    cursor: State
    """Where the run resumes after this step."""
    epoch: float
    """Passes over the data, this step included."""
    metrics: Mapping[str, Ratio] = field(default_factory=dict)
    """What the source measured while making the step, such as rewards; logged with the objective's metrics."""
    take: Callable[[Sequence[Mapping[str, Tensor]]], None] | None = None
    """Called after the update and before a checkpoint, on every rank: with what the objective read of each pack, as
    `Engine.infer` gives it."""


class Steps(Protocol):
    """A task's optimizer steps."""

    train_iters: int
    """Number of optimizer steps of the run."""
    course: str
    """What the run draws, in words, for the log."""

    def require(self, cursor: State) -> None:
        """Raises: DataError when the cursor was saved with other data or settings than this source's."""

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        """Endless steps, starting at the cursor. Args: `engine`: for sources that run the model."""
        ...

    def places(self, pack: Pack) -> Sequence[str]:
        """Where the samples of a pack come from, such as `train.jsonl:17`; empty if unknown."""
        return ()


class Evaluator(Protocol):
    """A task's evaluation."""

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        """Metrics over the validation data, the same on every rank. Args: `on_batch`: called after each batch."""
        ...
