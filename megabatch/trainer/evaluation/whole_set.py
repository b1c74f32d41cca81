"""Measures that need every sample of an evaluation at once, such as a ranking of all documents.

The evaluation is the run's own, with one forward pass: the objective is asked for its terms as always. What it read of
each sequence is kept on the last pipeline stage, joined over data-parallel ranks at the end, and measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.data.dataset import Validation
from megabatch.trainer.engine import Engine
from megabatch.trainer.objectives.objective import Inference, Mean, Objective, Terms
from megabatch.trainer.steps import Evaluator
from megabatch.trainer.sums import Ratio, Sums

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

Arrays = Mapping[str, np.ndarray]
"""fp64 [M, …] of all sequences, or all learned tokens, by name."""
ITEM, POSITION = "item", "position"
_ROWS_BITS = 40
"""Rows of an evaluation on one rank are fewer than two to this power."""


@dataclass(frozen=True, slots=True)
class Measures:
    """What is kept of each sequence, or of each learned token, and what is measured of all of them."""

    outputs: Sequence[str]
    """Fields of the objective's readout, one value or row for each."""
    columns: Sequence[str]
    """Columns of the samples, or of their tokens."""
    prepared: Callable[[Arrays], Any]
    """What the measures take, made of the outputs and columns of all of them, and `item`, the number of the row that
    each belongs to; for tokens also `position`."""
    of: Mapping[str, Callable[[Any], float]]
    """The measures, each by its name; NaN where one is not defined."""
    per: Literal["sequence", "token"] = "sequence"
    of_rows: Mapping[str, Callable[[Pack], Tensor]] = field(default_factory=dict)
    """Further columns by name, each from a whole row before context parallelism cuts it: [N]."""

    def values(self, found: Arrays) -> dict[str, float]:
        """Each measure of these arrays."""
        prepared = self.prepared(found)
        return {name: measure(prepared) for name, measure in self.of.items()}


@dataclass(frozen=True, slots=True)
class WholeSet(Evaluator):
    """Adds measures of the whole set to an evaluation; they replace means over batches of the same name."""

    inner: Validation
    measures: Measures

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        kept = _Kept(self.inner.objective, self.measures)
        found = replace(self.inner, objective=kept).evaluate(engine, on_batch=on_batch)
        return {**found, **self._measured(engine, kept)}

    def _measured(self, engine: Engine, kept: _Kept) -> dict[str, Ratio]:
        """The same on every rank: one of them adds its values to sums that all get."""
        ranks = engine.ranks
        sums = Sums(tuple(self.measures.of), ranks)
        if ranks.is_last_stage:
            values = self.measures.values(kept.everyone(engine))
            if sums.adds and dist.get_rank(ranks.replicas) == 0:
                sums.add([{name: as_mean(value, ranks.device) for name, value in values.items()}])
        return sums.reduce().read()[0]


def with_measures(evaluator: Validation | None, measures: Measures) -> Evaluator | None:
    """The evaluation with these measures, where there is one."""
    return None if evaluator is None else WholeSet(evaluator, measures)


def as_mean(value: float, device: torch.device) -> Mean:
    """The value with the count 1, or 0 with the count 0 for NaN; 0-d fp64 on the device, where `Sums` adds them."""
    is_known = not np.isnan(value)
    total, count = torch.tensor([value if is_known else 0.0, float(is_known)], dtype=torch.float64, device=device)
    return Mean(total, count)


@dataclass(slots=True)
class _Kept(Objective):
    """An objective that keeps what it was given."""

    inner: Objective
    measures: Measures
    found: list[dict[str, Tensor]] = field(default_factory=list)
    rows: list[int] = field(default_factory=lambda: [0])
    """Rows before each pack, and all."""

    def __post_init__(self) -> None:
        self.norm, self.metrics, self.readout = self.inner.norm, self.inner.metrics, self.inner.readout

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        made = self.measures.of_rows
        return [
            replace(pack, columns={**pack.columns, **{name: of(pack) for name, of in made.items()}})
            for pack in self.inner.prepare(packs, inference)
        ]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        outputs = {name: out[name].detach() for name in self.measures.outputs}
        of_each = pack.token_columns if self._of_tokens else pack.columns
        some = {ITEM: pack.items_N, **outputs, **{name: of_each[name] for name in self._columns}}
        if self._of_tokens:
            learned = pack.weights_T > 0
            some |= {ITEM: torch.cat([pack.items_N, pack.items_N[:1]])[pack.segments_T.long()]}
            some = {name: values[learned] for name, values in (some | {POSITION: pack.positions_T}).items()}
        self.found.append(some)
        self.rows.append(self.rows[-1] + (int(pack.items_N[-1]) + 1 if pack.sequences else 0))
        return self.inner.terms(out, pack)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self.measures.columns, *self.measures.of_rows)

    @property
    def _of_tokens(self) -> bool:
        return self.measures.per == "token"

    def everyone(self, engine: Engine) -> dict[str, np.ndarray]:
        """Of every data-parallel rank, on each of them; collective over them. Rows are numbered in their order."""
        first = engine.ranks.dp_rank << _ROWS_BITS
        items = [one[ITEM] + first + row for one, row in zip(self.found, self.rows, strict=False)]
        names = (*self.measures.outputs, *self._columns, *((POSITION,) if self._of_tokens else ()))
        parts = {ITEM: torch.cat(items), **{name: torch.cat([one[name] for one in self.found]) for name in names}}
        joined = {
            name: engine.everyone(values, parts=self._of_tokens)[0].cpu().numpy() for name, values in parts.items()
        }
        numbers = np.unique(joined.pop(ITEM), return_inverse=True)[1]
        return {ITEM: numbers, **{name: values.astype(np.float64) for name, values in joined.items()}}
