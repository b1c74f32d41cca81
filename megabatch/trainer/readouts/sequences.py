"""The log-probability of each sequence's learned tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.ops.vocab import token_collisions, token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Sequences(Readout):
    """`logps` [N] fp32: sum over a sequence's tokens of weight · log p(token).

    With `discount`, the name of a column of tokens, also `discounted` [N]: the same with each term multiplied by it.
    """

    discount: str | None = None
    collisions: bool = False
    """Whether `collisions` [N] is among the fields, without gradient: sum over a sequence's tokens of weight · log of
    the sum of squared probabilities at the token's place."""

    @property
    def weighted_only(self) -> bool:
        return True

    @property
    def fields(self) -> Mapping[str, Field]:
        given = {"logps": True, "discounted": self.discount is not None, "collisions": self.collisions}
        return {name: Field("sequence") for name, wanted in given.items() if wanted}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        logps_T = pack.spread(token_logps(output, pack.read(pack.targets_T), split.vocab)) * pack.weights_T
        found = {"logps": pack.sequence_sums(logps_T)}
        if self.discount is not None:
            found["discounted"] = pack.sequence_sums(logps_T * pack.token_columns[self.discount])
        if self.collisions:
            collisions_T = pack.spread(token_collisions(output, split.vocab))
            found["collisions"] = pack.sequence_sums(collisions_T * pack.weights_T)
        return found
