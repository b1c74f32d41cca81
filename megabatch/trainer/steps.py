"""Where optimizer steps come from: the contract between the loop and a task's source of batches.

A source may draw from a dataset, or generate, reward and pack inside `next`. The loop neither knows nor asks: it saves
the cursor of the last step that was taken, and hands it back when the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.pack import Pack
from megabatch.trainer.sums import Ratio

if TYPE_CHECKING:
    from megabatch.trainer.engine import Engine

State = Mapping[str, Any]
"""All that decides the next step, as JSON: `{}` at a run's beginning; only the source that made it reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step, or one batch of an evaluation. All but `packs` is the same on every rank."""

    packs: list[Pack]
    """This rank's micro-batches; ranks of one model replica draw the same."""
    totals: Mapping[Norm, float]
    """Denominators of the global batch, known with no reduction."""
    filled: int
    """Micro-batches of the global batch that hold samples, on all data-parallel ranks; at least 1."""
    tokens: int
    """Tokens of the global batch, without padding."""
    samples: int
    """Samples of the global batch."""
    mean_length: float
    """Length of the sequence that a token is in, on average: sum of squared lengths over their sum."""
    cursor: State
    """Where to go on after this step."""
    epoch: float
    """Passes over the data up to and with this step."""
    metrics: Mapping[str, Ratio] = field(default_factory=dict)
    """What the source found out while it made the step, such as rewards; logged with the objective's."""


class Steps(Protocol):
    """A task's optimizer steps."""

    train_iters: int
    """Length of the run."""
    course: str
    """What the run draws, in words."""

    def require(self, cursor: State) -> None:
        """Raises: DataError when the cursor belongs to other data or settings than this source's."""

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        """Steps from a cursor on, without end. Args: `engine`: for sources that ask the model."""
        ...

    def places(self, pack: Pack) -> Sequence[str]:
        """Where the samples of a pack come from, such as `train.jsonl:17`; nothing where that is not known."""
        return ()


class Evaluator(Protocol):
    """A task's evaluation."""

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        """Metrics over the validation data, equal on every rank. Args: `on_batch` is called after each batch."""
        ...
