"""How much more likely one answer is than another, right after the last token of each sequence.

K: the two answers, the one that is scored first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.ops.picked import picked_logits
from megabatch.trainer.readouts.readout import Field, Readout, Split
from megabatch.trainer.readouts.scores import ends

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Answers(Readout):
    """`scores` [N, 1] fp32: the logit of one token less that of another at the last token of each sequence.

    sigmoid(score) is the probability of the first among the two, which is how Qwen3-Reranker ranks (arXiv:2506.05176).
    """

    positive: int
    """Id in the vocabulary."""
    negative: int

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"scores": Field("sequence", (1,))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        both_TK = torch.tensor([self.positive, self.negative], device=output.device).expand(len(output), -1)
        logits_TK = picked_logits(output, both_TK, split.vocab)
        scores_T1 = logits_TK[:, :1] - logits_TK[:, 1:]
        return {"scores": pack.sequence_sums(scores_T1 * ends(pack)[:, None])}
