"""A teacher's hidden states at each position, and a student's divergence from the distribution that they give.

Hidden states are kept from the teacher's pass to the student's, and not logits: a position has a few thousand numbers
in place of the whole vocabulary's. The teacher's output layer is applied to a few rows at a time (`ops.divergence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megabatch.trainer.ops.divergence import Compared, divergences
from megabatch.trainer.ops.vocab import token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

HIDDEN = "teacher_hidden"
"""Column of tokens: the teacher's hidden states as four-byte integers, [T, H · bytes / 4]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayer:
    """What turns a teacher's hidden states into logits, on the last pipeline stage."""

    hidden_size: int
    """H."""
    dtype: torch.dtype
    """Of hidden states and weights."""
    vocab_size: int
    """Of the teacher."""
    weight_RH: Tensor | None
    """The rows of this rank's part of the student's vocabulary that the teacher has; None on other stages."""

    @property
    def hidden(self) -> Field:
        return Field("token", (self.hidden_size * self.dtype.itemsize // 4,), torch.int32)


@dataclass(frozen=True, slots=True)
class HiddenStates(Readout):
    """`teacher_hidden`: the numbers' own bits, so that nothing is rounded on the way."""

    layer: OutputLayer

    @property
    def fields(self) -> Mapping[str, Field]:
        return {HIDDEN: self.layer.hidden}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        return {HIDDEN: output.to(self.layer.dtype).contiguous().view(torch.int32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FromTeacher(Readout):
    """`divergence` [T] fp32 from the teacher whose hidden states are in the pack; with `targets` also `logps`."""

    layer: OutputLayer
    beta: float
    temperature: float
    targets: bool = False

    @property
    def fields(self) -> Mapping[str, Field]:
        return {name: Field("token") for name in ("divergence", *(("logps",) if self.targets else ()))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        layer, weight_RH = self.layer, self.layer.weight_RH
        assert weight_RH is not None, "only the last stage reads an output"
        hidden_TH = pack.token_columns[HIDDEN].view(layer.dtype)
        shared = replace(split.vocab, vocab_size=min(layer.vocab_size, split.vocab.vocab_size))
        how = Compared(
            beta=self.beta,
            temperature=self.temperature,
            teacher=lambda rows: nn.functional.linear(hidden_TH[rows], weight_RH),
            shard=shared,
        )
        # tokens that the teacher lacks still count in the student's own log-probabilities
        together = shared.vocab_size == split.vocab.vocab_size
        apart_T, logps_T = divergences(output, pack.targets_T if self.targets and together else None, how)
        if not self.targets:
            return {"divergence": apart_T}
        if not together:
            logps_T = token_logps(output, pack.targets_T, split.vocab)
        return {"divergence": apart_T, "logps": logps_T}
