"""Whether an engine has the trainer's weights: both score the same fixed sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabatch.data.tokens.sample import Sample
from megabatch.rollout.engine import Scored
from megabatch.trainer.data.global_batch import Share
from megabatch.trainer.engine import Engine
from megabatch.trainer.pack import Pack, collate
from megabatch.trainer.readouts.tokens import Tokens

_SEQUENCES = 4
_PROMPT = 4
_COMPLETION = 28


@dataclass(frozen=True, slots=True)
class Agreement:
    """Absolute differences between the trainer's and an engine's log-probabilities of tokens."""

    largest: float
    mean: float


def fixed_sequences(vocab: int, *, positions: int) -> list[Scored]:
    """Random tokens, the same for every run with this vocabulary. Args: positions: how many tokens the model takes."""
    numbers = random.Random(0)
    prompt, completion = min(_PROMPT, positions // 2), min(_COMPLETION, positions - positions // 2)
    return [
        (
            tuple(numbers.randrange(vocab) for _ in range(prompt)),
            tuple(numbers.randrange(vocab) for _ in range(completion)),
        )
        for _ in range(_SEQUENCES)
    ]


def trainers_scores(engine: Engine, sequences: Sequence[Scored], share: Share) -> list[tuple[float, ...]]:
    """The trainer's log-probabilities of each sequence's completion; collective, the same on every rank."""
    count = share.interleaving.rounds(1)
    dealt = [sequences[first::count] for first in range(count)]
    packs = [_pack(some, share) for some in dealt]
    found = engine.infer(packs, Tokens())
    scores: dict[Scored, tuple[float, ...]] = {}
    for pack, some, one in zip(packs, dealt, found, strict=True):
        logps = one["logps"].tolist()
        for start, (prompt, completion) in zip(pack.cu_seqlens_padded.tolist(), some, strict=False):
            first = start + len(prompt) - 1
            scores[prompt, completion] = tuple(logps[first : first + len(completion)])
    return [scores[one] for one in sequences]


def _pack(sequences: Sequence[Scored], share: Share) -> Pack:
    samples = [
        Sample(np.array(prompt + completion, np.int32), np.ones(len(prompt + completion), np.float32))
        for prompt, completion in sequences
    ]
    length = max((len(prompt + completion) for prompt, completion in sequences), default=0)
    padded = -(-length // share.sequence_multiple) * share.sequence_multiple
    return collate(
        samples,
        row_multiple=share.row_multiple,
        sequence_multiple=share.sequence_multiple,
        sequence_length=padded if share.equal_sequences else 0,
    )


def agreement(mine: Sequence[Sequence[float]], engines: Sequence[Sequence[float]]) -> Agreement:
    pairs = zip(np.concatenate(mine), np.concatenate(engines), strict=True)
    # not a number agrees with nothing, and max() would pass it over
    differences = np.nan_to_num(np.array([abs(a - b) for a, b in pairs]), nan=np.inf)
    return Agreement(float(differences.max()), float(differences.mean()))
