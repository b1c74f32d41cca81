"""What models behind servers say of a run's tokens: one rank of each replica asks, the others are told.

Ranks wait for the servers however long they take. Raises everywhere: RolloutError on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.data.tokens.sample import TEACHER_NUMBER
from megabatch.rl.rounds import Rolled
from megabatch.rollout.vllm.scoring import ScoringServers
from megabatch.trainer.objectives.objective import Inference
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.top_tokens import IDS, LOGITS


def asks(ranks: Ranks) -> bool:
    """Whether this rank asks for its replica's rows."""
    return dist.get_rank(ranks.model) == 0 and dist.get_rank(ranks.cp) == 0


@dataclass(frozen=True, slots=True)
class ServedLogps:
    """A model's log-probabilities of completions, of which each data-parallel rank asks for its share."""

    servers: ScoringServers
    ranks: Ranks

    def begin(self, completions: Sequence[Rolled]) -> Coming:
        """Has them computed; the ranks may do something else meanwhile. Every rank has all completions."""
        asked = None
        if asks(self.ranks):
            texts = [(one.prompt.tolist(), one.ids.tolist()) for one in self._mine(completions)]
            asked = self.servers.begin_logps(texts)
        return Coming(self, completions, asked)

    def _mine(self, completions: Sequence[Rolled]) -> Sequence[Rolled]:
        return completions[self.ranks.dp_rank :: self.ranks.dp_size]

    def everyone(self, completions: Sequence[Rolled], mine: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What all ranks were told, on every rank: a sum of numbers to which one rank adds each."""
        lengths = [len(one.ids) for one in completions]
        found_T = torch.zeros(sum(lengths))
        parts = found_T.split(lengths)
        for place, own in zip(parts[self.ranks.dp_rank :: self.ranks.dp_size], mine, strict=False):
            place.copy_(torch.from_numpy(own))
        if dist.get_world_size() > 1:
            found_T = found_T.to(self.ranks.device)
            dist.all_reduce(found_T)
        return [part.numpy() for part in found_T.cpu().split(lengths)]


@dataclass(frozen=True, slots=True)
class Coming:
    """What servers are computing."""

    served: ServedLogps
    completions: Sequence[Rolled]
    asked: Future[list[np.ndarray]] | None
    """None on ranks that do not ask."""

    def take(self) -> list[np.ndarray]:
        """The log-probability of each token of each completion: float32, on every rank; collective."""
        mine = self.served.ranks.each(lambda: [] if self.asked is None else self.asked.result())
        return self.served.everyone(self.completions, mine)


class ServedTeacher:
    """`objectives.gkd.Teacher`; every rank has it, and all call it together."""

    def __init__(self, servers: Sequence[ScoringServers], ranks: Ranks, *, count: int) -> None:
        """Args: servers: of one teacher for all samples, or of those that the samples' column `TEACHER_NUMBER` counts;
        count: K."""
        self._servers, self._ranks, self._count = servers, ranks, count

    def columns(self, packs: Sequence[Pack], inference: Inference) -> list[dict[str, Tensor]]:
        """`teacher_ids` [T, K] and `teacher_logits` [T, K], which are log-probabilities here."""
        found = self._ranks.each(lambda: self._asked(packs) if asks(self._ranks) else None)
        return [self._told(pack, None if found is None else found[number]) for number, pack in enumerate(packs)]

    def _asked(self, packs: Sequence[Pack]) -> list[tuple[Tensor, Tensor]]:
        places = [(number, *part) for number, pack in enumerate(packs) for part in _sequences(pack)]
        found = [self._empty(pack) for pack in packs]
        whose = [teacher for pack in packs for teacher in _teachers(pack)]
        for teacher, servers in enumerate(self._servers):
            its = [place for place, other in zip(places, whose, strict=True) if other == teacher]
            answers = servers.likeliest([packs[number].ids_T[a:b].tolist() for number, a, b in its]) if its else ()
            for (number, a, b), said in zip(its, answers, strict=True):
                for column, values in zip(found[number], said, strict=True):
                    column[a:b] = torch.from_numpy(np.ascontiguousarray(values))
        return found

    def _empty(self, pack: Pack) -> tuple[Tensor, Tensor]:
        shape = (len(pack.ids_T), self._count)
        return torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.float32)

    def _told(self, pack: Pack, found: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        columns = self._empty(pack) if found is None else found
        told = [column.to(self._ranks.device) for column in columns]
        for group in (self._ranks.model, self._ranks.cp):
            if dist.get_world_size(group) > 1:
                for column in told:
                    dist.broadcast(column, src=dist.get_global_rank(group, 0), group=group)
        return dict(zip((IDS, LOGITS), told, strict=True))


def _teachers(pack: Pack) -> list[int]:
    """The number of each sequence's teacher."""
    if TEACHER_NUMBER not in pack.columns:
        return [0] * pack.sequences
    return [int(number) for number in pack.columns[TEACHER_NUMBER].tolist()]


def _sequences(pack: Pack) -> list[tuple[int, int]]:
    """Where the tokens of each sequence are in the row, padding left out."""
    starts, lengths = pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()
    return [(start, start + length) for start, length in zip(starts, lengths, strict=False)][: pack.sequences]
