"""What rollout engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megabatch.rollout.engine import Sampling


def by_transformers(logits_V: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Log-probabilities of the distribution that transformers draws the token after `ids` from, [V]."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as by

    steps = LogitsProcessorList([by.RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty)])
    steps.append(by.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        steps.append(by.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(by.TopPLogitsWarper(sampling.top_p))
    found: Tensor = steps(torch.tensor([list(ids)]), logits_V[None])
    return found[0].log_softmax(-1)
