"""A teacher's most likely tokens at each position, and a student's logits of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.ops.picked import picked_logits, top_logits
from megabatch.trainer.ops.vocab import token_logps
from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

IDS, LOGITS = "teacher_ids", "teacher_logits"
"""Columns of tokens with the teacher's choice: [T, K] int32 and fp32."""


@dataclass(frozen=True, slots=True)
class TopTokens(Readout):
    """`teacher_ids` [T, K] int32 and `teacher_logits` [T, K] fp32: the K largest logits of each position."""

    count: int
    """K."""
    vocab_size: int
    """Ids from here on are left out: the student has none of them."""

    @property
    def fields(self) -> Mapping[str, Field]:
        shape = (self.count,)
        return {IDS: Field("token", shape, torch.int32), LOGITS: Field("token", shape)}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        shared = replace(split.vocab, vocab_size=min(self.vocab_size, split.vocab.vocab_size))
        logits_TK, ids_TK = top_logits(output, self.count, shared)
        return {IDS: ids_TK.int(), LOGITS: logits_TK}


@dataclass(frozen=True, slots=True)
class TeachersTokens(Readout):
    """`logits` [T, K] fp32 of the ids in the column `teacher_ids`; with `targets` also `logps` [T] (`Tokens`)."""

    count: int
    targets: bool = False

    @property
    def fields(self) -> Mapping[str, Field]:
        found = {"logits": Field("token", (self.count,))}
        return {**found, "logps": Field("token")} if self.targets else found

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        found = {"logits": picked_logits(output, pack.token_columns[IDS].long(), split.vocab)}
        if self.targets:
            found["logps"] = token_logps(output, pack.targets_T, split.vocab)
        return found
