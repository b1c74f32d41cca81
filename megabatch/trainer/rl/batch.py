"""Completions as batches: dealt to ranks for a training step, or for log-probabilities of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.data.cache.in_memory import in_memory
from megabatch.data.rows.files import Origin
from megabatch.data.tokens.chunk import Chunk
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.shared import SHARED
from megabatch.rl.rounds import Rolled
from megabatch.trainer.data.global_batch import GlobalBatch, Share
from megabatch.trainer.engine import POLICY, Engine
from megabatch.trainer.objectives.grpo import ADVANTAGE, CORRECTION, OLD, REFERENCE, SAMPLED, TEACHER
from megabatch.trainer.pack import Pack
from megabatch.trainer.readouts.tokens import Tokens
from megabatch.trainer.routes import ROUTES
from megabatch.trainer.steps import State, Step

LEARNED_WITH = (OLD, REFERENCE, CORRECTION, SAMPLED, TEACHER)
"""Numbers of a completion's tokens that the loss uses, where a round has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How a run's completions become rows."""

    share: Share
    group: int
    """Completions of a prompt that must lie in one row for the loss: 1, or all of them."""
    together: int = 1
    """Completions of a prompt that lie in one row of a step, so that they share its tokens (`shares_prompts`)."""
    infer_batch_size: int
    """Completions of a micro-batch where only log-probabilities are computed."""
    inferred_together: int = 1
    """What `together` is there."""
    filters_cut_off: bool
    """Whether completions that were cut off are left out of the loss."""

    def step(self, completions: Sequence[Rolled], *, cursor: State, epoch: float) -> Step:
        """One optimizer step's share of this rank."""
        group = max(self.group, self.together)
        step = self._dealt(completions, group, self.share.micro_batch_size, cursor=cursor, epoch=epoch)
        return replace(step, packs=[_with_routes(pack, completions) for pack in step.packs])

    def logps(
        self, engine: Engine, completions: Sequence[Rolled], readout: Tokens, *, model: str = POLICY
    ) -> list[np.ndarray]:
        """Log-probabilities of each completion's tokens, float32, on every rank; collective, one pass for all."""
        return [logps for logps, _ in self._inferred(engine, completions, readout, model=model, records=False)]

    def logps_and_routes(
        self, engine: Engine, completions: Sequence[Rolled], readout: Tokens
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The policy's log-probabilities, and the experts that it sent each token to (`Rolled.routes`)."""
        found = self._inferred(engine, completions, readout, model=POLICY, records=True)
        return [(logps, experts) for logps, experts in found if experts is not None]

    def _inferred(
        self, engine: Engine, completions: Sequence[Rolled], readout: Tokens, *, model: str, records: bool
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        step = self._dealt(completions, self.inferred_together, self.infer_batch_size)
        packs = [_with_routes(pack, completions) for pack in step.packs] if model == POLICY else step.packs
        found = engine.infer(packs, readout, model=model, records_routes=records)
        return _of_everyone(engine, step.packs, found, completions)

    def read(
        self,
        engine: Engine,
        packs: Sequence[Pack],
        found: Sequence[Mapping[str, Tensor]],
        completions: Sequence[Rolled],
    ) -> list[np.ndarray]:
        """`logps` that were read from the packs of a step of the same completions."""
        return [logps for logps, _ in _of_everyone(engine, packs, found, completions)]

    def _dealt(
        self, completions: Sequence[Rolled], group: int, each: int, *, cursor: State | None = None, epoch: float = 0.0
    ) -> Step:
        """This rank's share. Args: group: completions that lie in one row; each: completions of a micro-batch."""
        share = replace(self.share, micro_batch_size=max(1, each // group))
        return self._batch(completions, group=group).step(share, cursor=cursor or {}, epoch=epoch)

    def _batch(self, completions: Sequence[Rolled], *, group: int) -> GlobalBatch:
        chunk = Chunk()
        for number, one in enumerate(completions):
            chunk.add([self._encoded(one, is_first=number % group == 0)], Origin("completions", number, is_line=False))
        packs = [np.arange(first, first + group) for first in range(0, len(completions), group)]
        return GlobalBatch(in_memory([chunk.arrays()]), packs, [np.zeros(group, np.int64)] * len(packs))

    def _encoded(self, one: Rolled, *, is_first: bool) -> Encoded:
        """Args: `is_first`: whether it has its prompt's tokens where those after it share them."""
        before: np.ndarray = np.zeros(len(one.prompt), np.float32)
        learned: np.ndarray = one.mask * np.float32(not (self.filters_cut_off and one.is_cut_off))
        names = [name for name in LEARNED_WITH if name in one.tokens]
        return Encoded(
            np.concatenate([one.prompt, one.ids]).astype(np.int32),
            np.concatenate([before, learned]),
            {ADVANTAGE: one.advantage, SHARED: 0 if is_first else len(one.prompt) - 1},
            {name: np.concatenate([before, one.tokens[name]]).astype(np.float32) for name in names},
        )


def _of_everyone(
    engine: Engine, packs: Sequence[Pack], found: Sequence[Mapping[str, Tensor]], completions: Sequence[Rolled]
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Log-probabilities of each completion, and its experts where they were recorded, on every rank; collective over
    the ranks that have other completions."""
    mine: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    narrow = np.uint8 if (engine.model.shape.num_experts or 0) <= 256 else np.int16
    for pack, fields in zip(packs, found, strict=True):
        logps = fields["logps"].cpu().numpy()
        experts = fields[ROUTES].cpu().numpy().astype(narrow) if ROUTES in fields else None
        for one in _parts(pack, completions):
            found_experts = None if experts is None else np.concatenate([experts[part] for part in one.tokens])
            mine[one.number] = (logps[one.predicted], found_experts)
    everyone: list[dict[int, tuple[np.ndarray, np.ndarray | None]] | None] = [mine]
    if engine.ranks.dp_size > 1:
        everyone = [None] * engine.ranks.dp_size
        dist.all_gather_object(everyone, mine, group=engine.ranks.dp)
    joined = {number: values for some in everyone if some is not None for number, values in some.items()}
    return [joined[number] for number in range(len(completions))]


def _with_routes(pack: Pack, completions: Sequence[Rolled]) -> Pack:
    """The pack with the column `ROUTES` of its tokens, where the completions have routes; padding goes to expert 0."""
    routes = [one.routes for one in completions if one.routes is not None]
    if not routes:
        return pack
    experts = np.zeros((len(pack.ids_T), *routes[0].shape[1:]), routes[0].dtype)
    for one in _parts(pack, completions):
        before, own = one.tokens
        experts[own] = routes[one.number][before.stop - before.start :]
    return replace(pack, token_columns={**pack.token_columns, ROUTES: torch.from_numpy(experts)})


class _Part(NamedTuple):
    """Where a completion lies in a row."""

    number: int
    tokens: tuple[slice, slice]
    """The tokens of its prompt that it shares, in the row's first completion of that prompt; and its own."""
    predicted: slice
    """The positions where the completion's tokens are predicted."""


def _parts(pack: Pack, completions: Sequence[Rolled]) -> list[_Part]:
    """Of each sequence of a whole row."""
    numbers, starts = pack.columns["number"].tolist(), pack.cu_seqlens_padded.tolist()
    shared = pack.shared
    found = []
    for place, (number, start) in enumerate(zip(numbers, starts, strict=False)):
        one = completions[number]
        first, count = (0, 0) if shared is None else (int(shared.starts_S[place]), int(shared.counts_S[place]))
        answer = start + len(one.prompt) - count
        found.append(
            _Part(
                number,
                (slice(first, first + count), slice(start, answer + len(one.ids))),
                slice(answer - 1, answer - 1 + len(one.ids)),
            )
        )
    return found
