"""The log-probability of each target token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.ops.vocab import token_entropies, token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Tokens(Readout):
    """`logps` [T] fp32: log p(targets_T[t]) at each position; last positions and padding have that of token 0.

    `entropies` [T] fp32 where asked for: of the distribution that a position's target is drawn from, in nats and
    without gradient. With `weighted_only`, positions of weight 0 may have 0 instead.
    """

    temperature: float = 1.0
    """Divides the logits."""
    entropies: bool = False
    weighted_only: bool = False

    @property
    def fields(self) -> Mapping[str, Field]:
        return {name: Field("token") for name in (("logps", "entropies") if self.entropies else ("logps",))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        targets_t = pack.read(pack.targets_T)
        found = {"logps": token_logps(output, targets_t, split.vocab, temperature=self.temperature)}
        if self.entropies:
            found["entropies"] = token_entropies(output, split.vocab, temperature=self.temperature)
        return {name: pack.spread(values_t) for name, values_t in found.items()}
