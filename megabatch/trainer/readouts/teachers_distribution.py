"""A teacher's hidden states at each position, and a student's divergence from the distribution that they give.

Hidden states are kept from the teacher's pass to the student's, and not logits: a position has a few thousand numbers
in place of the whole vocabulary's. The teacher's output layer is applied to a few rows at a time (`ops.divergence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megabatch.data.tokens.sample import TEACHER_NUMBER
from megabatch.trainer.ops.divergence import Compared, Teacher, divergences
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
    def width(self) -> int:
        """Four-byte integers of a position's hidden states."""
        return self.hidden_size * self.dtype.itemsize // 4

    @property
    def hidden(self) -> Field:
        return Field("token", (self.width,), torch.int32)

    def logits(self, bits_T: Tensor) -> Tensor:
        """[T, R] of hidden states [T, …] as integers, of which those behind `width` are not this teacher's."""
        assert self.weight_RH is not None, "only the last stage reads an output"
        return nn.functional.linear(bits_T[:, : self.width].contiguous().view(self.dtype), self.weight_RH)


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

    layers: Sequence[OutputLayer]
    """Of one teacher, or of those that the samples' column `TEACHER_NUMBER` counts, whose vocabularies are equal."""
    beta: float
    temperature: float
    targets: bool = False

    @property
    def fields(self) -> Mapping[str, Field]:
        return {name: Field("token") for name in ("divergence", *(("logps",) if self.targets else ()))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        shared = replace(split.vocab, vocab_size=min(self.layers[0].vocab_size, split.vocab.vocab_size))
        how = Compared(
            beta=self.beta,
            temperature=self.temperature,
            teacher=self._logits(pack),
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

    def _logits(self, pack: Pack) -> Teacher:
        """What the teacher of each position says."""
        hidden_T = pack.token_columns[HIDDEN]
        if len(self.layers) == 1:
            return lambda rows: self.layers[0].logits(hidden_T[rows])
        numbers_T = of_tokens(pack)

        def of_each(rows: slice) -> Tensor:
            found = [self.layers[0].logits(hidden_T[rows])]
            whose_t = numbers_T[rows]
            for number, layer in enumerate(self.layers[1:], start=1):
                its_t = (whose_t == number).nonzero()[:, 0]
                found[0][its_t] = layer.logits(hidden_T[rows][its_t]).to(found[0].dtype)
            return found[0]

        return of_each


def of_tokens(pack: Pack) -> Tensor:
    """The number of each position's teacher, int64 [T]; 0 in the row's padding."""
    numbers_N = pack.columns[TEACHER_NUMBER].long()
    return torch.cat([numbers_N, numbers_N.new_zeros(1)])[pack.segments_T.long()]
