"""A sweep: one recipe at many points, declared beside it in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, field
from typing import Any

from megabatch.config.recipe import Recipe
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Sweep:
    """A recipe and the values that some of its parameters take; `grid`, `zip` and `list` multiply.

    Parameters have the names of flags, flat (`lr`) or dotted (`learning_rate.lr`). A seed is a parameter, too.
    """

    recipe: Callable[[], Recipe]
    """The function that builds the recipe."""
    _: KW_ONLY
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Every combination of these values."""
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values combined pairwise, the first with the first and so on; all lists have the same length."""
    list: Sequence[Mapping[str, Any]] = ()
    """Explicit points; a parameter that a point leaves out keeps the recipe's value."""
    filter: Callable[[Recipe], bool] | None = None
    """Returns whether to run a point's recipe; the table still shows points that it rejects."""
    max_parallel: int | None = None
    """How many runs may run at once; None sets no limit on Slurm, and one at a time with `--local`."""
    name: str | None = None
    """Folder of its runs beneath `save`, and the arrays' name in the queue, unless the recipe has
    `resources.job_name`; None means the recipe file's name."""

    @property
    def declared(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.grid or self.zip or self.list)
