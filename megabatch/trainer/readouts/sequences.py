"""The log-probability of each sequence's learned tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.ops.vocab import token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Sequences(Readout):
    """`logps` [N] fp32: sum over a sequence's tokens of weight · log p(token).

    With `discount`, the name of a column of tokens, also `discounted` [N]: the same with each term multiplied by it.
    """

    discount: str | None = None

    @property
    def fields(self) -> Mapping[str, Field]:
        return {name: Field("sequence") for name in ("logps", "discounted")[: 1 if self.discount is None else 2]}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        logps_T = token_logps(output, pack.targets_T, split.vocab) * pack.weights_T
        found = {"logps": pack.sequence_sums(logps_T)}
        if self.discount is not None:
            found["discounted"] = pack.sequence_sums(logps_T * pack.token_columns[self.discount])
        return found
