"""Packs of the run's layout, computed by a model that lies otherwise on the same ranks.

The packs of all data-parallel ranks of the run are dealt in order over those of the model, whose ranks get them from
ranks that have them; what a readout found travels back in the same way. Neither weights nor logits travel, and a rank
holds only its own packs, those that its part of the model computes, and what was read of both.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.broadcast import shape_of
from megabatch.trainer.readouts.readout import Field

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

Dealt = Sequence[Sequence[tuple[int, int]]]
"""Of each data-parallel rank of the model its packs: whose they are in the run, and their numbers there."""


def deal(counts: Sequence[int], replicas: int) -> Dealt:
    """All packs in order, as many for each replica; the last one fills up.

    Args: counts: packs of each data-parallel rank of the run; replicas: data-parallel ranks of the model.
    """
    packs = [(owner, number) for owner, count in enumerate(counts) for number in range(count)]
    each = -(-len(packs) // replicas)
    packs += packs[-1:] * (each * replicas - len(packs))
    return [packs[replica * each : (replica + 1) * each] for replica in range(replicas)]


class OtherLayout:
    """The way from the run's ranks to a model's layout and back; collective over the world."""

    def __init__(self, own: Ranks, other: Ranks) -> None:
        """Args: own: the run's; other: the model's."""
        self._rank, self._device, self._replica = own.rank, own.device, other.dp_rank
        self._own, self._other = _replicas(own), _replicas(other)

    def there(self, packs: Sequence[Pack]) -> tuple[list[Pack], Dealt]:
        """The packs that this rank's part of the model computes. Args: packs: this rank's in the run."""
        pickled = [torch.frombuffer(bytearray(pickle.dumps(pack)), dtype=torch.uint8) for pack in packs]
        sizes = _everyones([len(one) for one in pickled])
        dealt = deal([len(sizes[ranks[0]]) for ranks in self._own], len(self._other))
        travel = _Travel(self._rank, dtype=torch.uint8, device="cpu")
        came: dict[tuple[int, int], Tensor] = {}
        for replica, share in enumerate(dealt):
            for owner, number in dict.fromkeys(share):
                for sender, receiver in _pairs(self._own[owner], self._other[replica]):
                    if sender == self._rank:
                        travel.send(pickled[number], receiver)
                    if receiver == self._rank:
                        came[owner, number] = travel.receive(sizes[sender][number], sender)
        travel.wait()
        found = {key: pickle.loads(one.numpy().tobytes()) for key, one in came.items()}
        return [found[key] for key in dealt[self._replica]], dealt

    def back(
        self, read: Sequence[Mapping[str, Tensor]], dealt: Dealt, packs: Sequence[Pack], fields: Mapping[str, Field]
    ) -> list[dict[str, Tensor]]:
        """The fields of this rank's packs. Args: read: what the model gave for the packs of `there`."""
        travel = _Travel(self._rank, dtype=torch.int32, device=self._device)
        came: dict[int, Tensor] = {}
        done: set[tuple[int, int]] = set()
        for replica, share in enumerate(dealt):
            for place, (owner, number) in enumerate(share):
                if (owner, number) in done:
                    continue
                done.add((owner, number))
                flat: Tensor | None = None
                for sender, receiver in _pairs(self._other[replica], self._own[owner]):
                    if sender == self._rank:
                        flat = _flat(read[place], fields) if flat is None else flat
                        travel.send(flat, receiver)
                    if receiver == self._rank:
                        size = sum(shape_of(packs[number], field).numel() for field in fields.values())
                        came[number] = travel.receive(size, sender)
        travel.wait()
        return [_fields(came[number], pack, fields) for number, pack in enumerate(packs)]


class _Travel:
    """Flat tensors on their way from and to this rank, all at once."""

    def __init__(self, rank: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._rank, self._dtype, self._device = rank, dtype, device
        self._moves: list[dist.P2POp] = []
        self._kept: Tensor | None = None

    def send(self, tensor: Tensor, receiver: int) -> None:
        """What a rank sends to itself it receives next."""
        if receiver == self._rank:
            self._kept = tensor
        else:
            self._moves.append(dist.P2POp(dist.isend, tensor, receiver))

    def receive(self, size: int, sender: int) -> Tensor:
        """Filled by `wait`."""
        if sender == self._rank:
            assert self._kept is not None
            return self._kept
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        self._moves.append(dist.P2POp(dist.irecv, tensor, sender))
        return tensor

    def wait(self) -> None:
        for work in dist.batch_isend_irecv(self._moves) if self._moves else ():
            work.wait()


def _replicas(ranks: Ranks) -> list[list[int]]:
    """The world's ranks by data-parallel rank of a layout: those that share packs."""
    found: list[list[int]] = [[] for _ in range(ranks.dp_size)]
    for rank, (replica,) in enumerate(_everyones([ranks.dp_rank])):
        found[replica].append(rank)
    return found


def _pairs(senders: Sequence[int], receivers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each receiver with its sender: itself where it has what is sent, else one of them in turn."""
    for place, receiver in enumerate(receivers):
        yield (receiver if receiver in senders else senders[place % len(senders)]), receiver


def _everyones(numbers: Sequence[int]) -> list[list[int]]:
    """A list of numbers of every rank."""
    world = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(numbers)]))
    padded = torch.zeros(max(int(count) for count in counts), dtype=torch.int64)
    padded[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    found = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return [one[: int(count)].tolist() for one, count in zip(found, counts, strict=True)]


def _flat(read: Mapping[str, Tensor], fields: Mapping[str, Field]) -> Tensor:
    """All fields as four-byte integers, one after the other."""
    return torch.cat(
        [read[name].to(field.dtype).contiguous().view(torch.int32).view(-1) for name, field in fields.items()]
    )


def _fields(flat: Tensor, pack: Pack, fields: Mapping[str, Field]) -> dict[str, Tensor]:
    shapes = [shape_of(pack, field) for field in fields.values()]
    parts = flat.split([shape.numel() for shape in shapes])
    return {
        name: part.view(field.dtype).view(shape)
        for (name, field), part, shape in zip(fields.items(), parts, shapes, strict=True)
    }
