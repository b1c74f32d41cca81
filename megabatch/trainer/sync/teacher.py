"""What teachers behind servers say of a step's packs: one rank of each replica asks, the others are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.data.tokens.sample import TEACHER_NUMBER
from megabatch.errors import MegabatchError
from megabatch.rollout.vllm.teacher import TeacherServer
from megabatch.trainer.objectives.objective import Inference
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.top_tokens import IDS, LOGITS


class ServedTeacher:
    """`objectives.gkd.Teacher`; every rank has it, and all call it together."""

    def __init__(self, servers: Sequence[TeacherServer], ranks: Ranks, *, count: int) -> None:
        """Args: servers: one for all samples, or those that the samples' column `TEACHER_NUMBER` counts; count: K."""
        self._servers, self._ranks, self._count = servers, ranks, count
        self._asks = dist.get_rank(ranks.model) == 0 and dist.get_rank(ranks.cp) == 0

    def columns(self, packs: Sequence[Pack], inference: Inference) -> list[dict[str, Tensor]]:
        """`teacher_ids` [T, K] and `teacher_logits` [T, K], which are log-probabilities here.

        Raises: RolloutError on every rank.
        """
        found, error = None, None
        try:
            found = self._asked(packs) if self._asks else None
        except MegabatchError as e:
            error = e
        self._ranks.raise_together(error)
        return [self._told(pack, None if found is None else found[number]) for number, pack in enumerate(packs)]

    def _asked(self, packs: Sequence[Pack]) -> list[tuple[Tensor, Tensor]]:
        places = [(number, *part) for number, pack in enumerate(packs) for part in _sequences(pack)]
        found = [self._empty(pack) for pack in packs]
        whose = [teacher for pack in packs for teacher in _teachers(pack)]
        for teacher, server in enumerate(self._servers):
            its = [place for place, other in zip(places, whose, strict=True) if other == teacher]
            answers = server.likeliest([packs[number].ids_T[a:b].tolist() for number, a, b in its]) if its else ()
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
