"""What is measured of a whole set of answers of which some are better: in pairs, or good and bad ones.

M: answers. P: pairs.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megabatch.trainer.evaluation import measures
from megabatch.trainer.evaluation.whole_set import Arrays, Measures
from megabatch.trainer.evaluation.yes_or_no import OF_CHANCES, YesOrNo, of_part
from megabatch.trainer.objectives.objective import REFERENCE
from megabatch.trainer.pack import Pack

GOOD, PROMPT = "label", "prompt"
_DIGEST_BYTES = 6
"""Of a prompt's number, which fp64 then holds."""


def of_rewards() -> Measures:
    """`auc`: how often any chosen answer is above any rejected one, of whatever pair. `ece` and `brier` of the
    probability sigmoid(r_chosen - r_rejected) that the chosen answer of a pair is the better one."""

    def auc(rewards_M: np.ndarray) -> float:
        return measures.auc(rewards_M, np.arange(len(rewards_M)) % 2 == 0)

    def pairs(rewards_M: np.ndarray) -> YesOrNo:
        chances_P = measures.sigmoid(rewards_M[0::2] - rewards_M[1::2])
        return YesOrNo(chances_P, np.ones(len(chances_P), bool))

    return Measures(["scores"], [], lambda found: found["scores"][:, 0], {"auc": auc, **of_part(OF_CHANCES, pairs)})


def of_judged_answers() -> Measures:
    """`pair_accuracy`: of every good and every bad answer to one prompt, how often the good one gained more over the
    reference. A prompt is what comes before an answer's first learned token."""

    def pair_accuracy(found: Arrays) -> float:
        return measures.pair_accuracy(found["logps"] - found[REFERENCE], found[GOOD], found[PROMPT])

    of_rows = {PROMPT: prompts_of}
    return Measures(["logps"], [REFERENCE, GOOD], dict, {"pair_accuracy": pair_accuracy}, of_rows=of_rows)


def prompts_of(pack: Pack) -> Tensor:
    """A number for the prompt of each sequence, equal where prompts are: int64 [N]."""
    starts, ids, learned = pack.cu_seqlens_padded.tolist(), pack.ids_T.numpy(), pack.weights_T.numpy() > 0
    numbers = []
    for start, stop in pairwise(starts[: pack.sequences + 1]):
        prompt = ids[start : start + int(learned[start:stop].argmax()) + 1]
        numbers.append(int.from_bytes(blake2b(prompt.tobytes(), digest_size=_DIGEST_BYTES).digest()))
    return torch.tensor(numbers, dtype=torch.int64)
