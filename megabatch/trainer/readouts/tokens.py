"""The log-probability of each target token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.ops.vocab import token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Tokens(Readout):
    """`logps` [T] fp32: log p(targets_T[t]) at each position; last positions and padding have that of token 0."""

    fields: Mapping[str, Field] = field(default_factory=lambda: {"logps": Field("token")})

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        return {"logps": token_logps(output, pack.targets_T, split.vocab)}
