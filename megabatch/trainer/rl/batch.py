"""Completions as batches: dealt to ranks for a training step, or for log-probabilities of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megabatch.data.cache.in_memory import in_memory
from megabatch.data.rows.files import Origin
from megabatch.data.tokens.chunk import Chunk
from megabatch.data.tokens.sample import Encoded
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
    """Completions that must lie in one row: 1, or those of a prompt."""
    filters_cut_off: bool
    """Whether completions that were cut off are left out of the loss."""

    def step(self, completions: Sequence[Rolled], *, cursor: State, epoch: float) -> Step:
        """One optimizer step's share of this rank."""
        step = self._batch(completions, group=self.group).step(self._share(self.group), cursor=cursor, epoch=epoch)
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
        step = self._batch(completions, group=1).step(self._share(1), cursor={}, epoch=0.0)
        found = engine.infer(step.packs, readout, model=model, records_routes=records)
        mine: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        narrow = np.uint8 if (engine.model.shape.num_experts or 0) <= 256 else np.int16
        for pack, fields in zip(step.packs, found, strict=True):
            logps = fields["logps"].cpu().numpy()
            experts = fields[ROUTES].cpu().numpy().astype(narrow) if records else None
            for number, whole, part in _parts(pack, completions):
                mine[number] = (logps[part], None if experts is None else experts[whole])
        everyone: list[dict[int, tuple[np.ndarray, np.ndarray | None]] | None] = [mine]
        if engine.ranks.dp_size > 1:
            everyone = [None] * engine.ranks.dp_size
            dist.all_gather_object(everyone, mine, group=engine.ranks.dp)
        joined = {number: values for some in everyone if some is not None for number, values in some.items()}
        return [joined[number] for number in range(len(completions))]

    def _share(self, group: int) -> Share:
        return replace(self.share, micro_batch_size=max(1, self.share.micro_batch_size // group))

    def _batch(self, completions: Sequence[Rolled], *, group: int) -> GlobalBatch:
        chunk = Chunk()
        for number, one in enumerate(completions):
            chunk.add([self._encoded(one)], Origin("completions", number, is_line=False))
        packs = [np.arange(first, first + group) for first in range(0, len(completions), group)]
        return GlobalBatch(in_memory([chunk.arrays()]), packs, [np.zeros(group, np.int64)] * len(packs))

    def _encoded(self, one: Rolled) -> Encoded:
        before: np.ndarray = np.zeros(len(one.prompt), np.float32)
        learned: np.ndarray = one.mask * np.float32(not (self.filters_cut_off and one.is_cut_off))
        names = [name for name in LEARNED_WITH if name in one.tokens]
        return Encoded(
            np.concatenate([one.prompt, one.ids]).astype(np.int32),
            np.concatenate([before, learned]),
            {ADVANTAGE: one.advantage},
            {name: np.concatenate([before, one.tokens[name]]).astype(np.float32) for name in names},
        )


def _with_routes(pack: Pack, completions: Sequence[Rolled]) -> Pack:
    """The pack with the column `ROUTES` of its tokens, where the completions have routes; padding goes to expert 0."""
    first = completions[0].routes
    if first is None:
        return pack
    experts = np.zeros((len(pack.ids_T), *first.shape[1:]), first.dtype)
    for number, whole, _ in _parts(pack, completions):
        experts[whole] = completions[number].routes
    return replace(pack, token_columns={**pack.token_columns, ROUTES: torch.from_numpy(experts)})


def _parts(pack: Pack, completions: Sequence[Rolled]) -> list[tuple[int, slice, slice]]:
    """For each sequence of a whole row: which completion it is, where it lies, and where its tokens are predicted."""
    starts, numbers = pack.cu_seqlens_padded.tolist(), pack.columns["number"].tolist()
    found = []
    for start, number in zip(starts, numbers, strict=False):
        one = completions[number]
        first = start + len(one.prompt) - 1
        whole = slice(start, start + len(one.prompt) + len(one.ids))
        found.append((number, whole, slice(first, first + len(one.ids))))
    return found
