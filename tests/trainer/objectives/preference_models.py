"""Small transformers models, and the engine's part of an objective computed with them in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.objective import Objective
from megabatch.trainer.ops.vocab import VocabShard
from megabatch.trainer.pack import Pack
from megabatch.trainer.readouts.readout import Readout, Split

VOCAB = 64


def small_model(seed: int, **fields: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
        | {"initializer_range": 0.2, "tie_word_embeddings": False}
        | fields
    )
    return transformers.Qwen3ForCausalLM(config)


def sample(prompt: Sequence[int], answer: Sequence[int], **columns: float) -> Sample:
    """The answer's tokens are learned."""
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return Sample(np.array([*prompt, *answer], np.int32), np.array(weights, np.float32), columns)


def row_logits(model: Any, pack: Pack) -> Tensor:
    """[T, V]: each sequence of the row on its own."""
    bounds = pack.cu_seqlens_padded.tolist()
    parts = [model(pack.ids_T[None, a:b]).logits[0] for a, b in pairwise(bounds)]
    return torch.cat(parts)


class Models:
    """What an engine of one process does for an objective."""

    def __init__(self, **models: Any) -> None:
        self.models = models

    def read(self, pack: Pack, readout: Readout, model: str = "policy") -> Mapping[str, Tensor]:
        logits_TV = row_logits(self.models[model], pack)
        vocab = logits_TV.shape[1]
        return readout(logits_TV, pack, Split(VocabShard(0, vocab, vocab, None)))

    def infer(self, packs: Sequence[Pack], readout: Readout, *, model: str = "policy") -> list[dict[str, Tensor]]:
        with torch.no_grad():
            return [dict(self.read(pack, readout, model)) for pack in packs]

    def total(self, values: Tensor) -> Tensor:
        return values

    def everyone(self, values: Tensor) -> tuple[Tensor, int]:
        return values, 0


def computed(
    objective: Objective, packs: Sequence[Pack], models: Models, *, total: float
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, gradient by parameter) of a global batch with this denominator."""
    policy = models.models["policy"]
    policy.zero_grad()
    prepared = objective.prepare(packs, models)  # type: ignore[arg-type]
    terms = [objective.terms(models.read(pack, objective.readout), pack) for pack in prepared]
    loss = torch.stack([one.numerator for one in terms]).sum() / total
    loss.backward()
    assert sum(float(one.weight) for one in terms) == total
    sums = {
        name: (sum(float(t.metrics[name].total) for t in terms), sum(float(t.metrics[name].count) for t in terms))
        for name in objective.metrics
    }
    return loss.item(), {name: a / b if b else math.nan for name, (a, b) in sums.items()}, gradient(policy)


def gradient(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_trl(model: Any, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient) of a trainer of TRL's."""
    model.zero_grad()
    found = loss()
    found.backward()
    return found.item(), gradient(model)
