"""A sweep: one recipe at many points, declared beside it in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from megabatch.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """A recipe and the values that some of its parameters take; `grid`, `zip` and `list` multiply.

    Parameters go by the names that flags have, flat (`lr`) or dotted (`learning_rate.lr`). Seeds are one of them.
    """

    recipe: Callable[[], Recipe]
    """The function that builds the recipe."""
    _: KW_ONLY
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Every combination of these values."""
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values that go together, the first with the first and so on; all of one length."""
    list: Sequence[Mapping[str, Any]] = ()
    """Points written out one by one; a parameter that one of them leaves out keeps the recipe's value."""
    filter: Callable[[Recipe], bool] | None = None
    """Says of a point's recipe whether to run it; a point that is left out is shown in the table."""
    max_parallel: int | None = None
    """How many runs may run at a time; None sets no limit on Slurm, and one at a time with `--local`."""
    name: str | None = None
    """Folder of its runs beneath `save`, and the arrays' name in the queue; None means the recipe file's name."""

    @property
    def declared(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.grid or self.zip or self.list)
