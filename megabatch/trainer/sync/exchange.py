"""Every rank's buckets of live weights on every rank that has an engine, one bucket at a time.

Tensors are gathered over their tensor-parallel groups, and buckets travel over the world. So that no rank waits in one
while another waits in the other, ranks export in rounds: the tensors of a round fill at most one bucket, ranks of a
group have the same rounds, and buckets travel between rounds.

Where no tensor is split over ranks and each has an engine, nothing is exchanged: engines read their own rank's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from megabatch.converters.bijection import invert
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.rollout.bucket import Bucket
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weight_buckets import ALIGN, BUCKET_BYTES, Room, bare_buckets, fill_buckets
from megabatch.trainer.weights import SAFETENSORS_DTYPES, Placed, export_placed, placed

_BUCKETS = 64
"""Of an update that only the main rank receives."""
_LEAST_BYTES = 16 << 20
"""Of such a bucket; it stays in a processor's cache while it is filled, digested and sent."""
Receivers = Literal["all", "main"]
"""The ranks that have engines."""


def shared_buckets(
    model: Model,
    table: Sequence[Mapped],
    ranks: Ranks,
    *,
    receivers: Receivers = "all",
    bucket_bytes: int | None = None,
    adapter: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Iterator[Bucket]:
    """All tensors of the model, each once, with the adapter in use merged in; or those of one adapter alone. Only
    receivers get buckets.

    Args: bucket_bytes: None for the default, which is smaller for the main rank alone: an engine that is sent one
    bucket while the next is filled works on all of an update but the first; shapes: of the Hugging Face tensors, where
    they do not follow from the table alone.
    Collective: every rank must exhaust the iterator. Memory holds the tensor being gathered, a bucket to send and one
    that came; of the main rank's alone, two of each. Raises: RolloutError for a bucket that arrives damaged.
    """
    shapes, dtype = shapes or invert(table), SAFETENSORS_DTYPES[model.config.params_dtype]
    items = placed(model, table, ranks, adapter=adapter)
    if receivers == "all" and _has_all(ranks):
        tensors = export_placed(model, items, ranks, replicas="all")
        yield from bare_buckets(tensors, shapes, dtype=dtype)
        return
    if bucket_bytes is None:
        bucket_bytes = BUCKET_BYTES if receivers == "all" else _share_of(table, ITEMSIZE[dtype])
    rounds = _rounds(items, bucket_bytes=bucket_bytes)
    most = torch.tensor(len(rounds))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    count = 2 if receivers == "main" else 1  # servers are sent one while the next is filled
    mine, others = Room(bucket_bytes, count=count), Room(bucket_bytes, count=count)
    for number in range(int(most)):
        some = rounds[number] if number < len(rounds) else []
        own = fill_buckets(export_placed(model, some, ranks), shapes, dtype=dtype, room=mine)
        yield from own if ranks.place.world_size == 1 else _sent_around(own, ranks, receivers, others)


def _share_of(table: Sequence[Mapped], itemsize: int) -> int:
    """Bytes of a bucket: a part of the model's, and enough for each tensor that may travel whole."""
    sizes = [itemsize * elements(mapped.shape) for mapped in table]
    fitting = [size for size in sizes if size <= BUCKET_BYTES]
    return min(BUCKET_BYTES, max(_LEAST_BYTES, sum(sizes) // _BUCKETS, *fitting))


def _has_all(ranks: Ranks) -> bool:
    """Whether every rank holds the whole model."""
    return ranks.tp_size == ranks.pp_size == ranks.ep_size == ranks.etp_size == 1


def _rounds(items: Sequence[Placed], *, bucket_bytes: int) -> list[list[Placed]]:
    """The tensors that fit into a bucket together, or one that is larger. Whole tensors count, whatever part of them
    this rank has, so that ranks which split them come to the same rounds."""
    rounds: list[list[Placed]] = []
    used = 0
    for item in items:
        size = elements(item.mapped.shape) * item.parameter.element_size()
        size *= 1 + len(item.mapped.copies)
        size += ALIGN * len({piece.hf for piece in item.mapped.pieces})
        if not rounds or used + size > bucket_bytes:
            rounds.append([])
            used = 0
        rounds[-1].append(item)
        used += size
    return rounds


def _sent_around(own: Iterator[Bucket], ranks: Ranks, receivers: Receivers, room: Room) -> Iterator[Bucket]:
    """The buckets of a round: each rank's first, then each rank's second, and so on. Args: room: for theirs."""
    is_receiver = receivers == "all" or ranks.is_main
    while True:
        bucket = next(own, None)
        manifests: list[Mapping[str, Any] | None] = [None] * ranks.place.world_size
        dist.all_gather_object(manifests, None if bucket is None else bucket.manifest())
        if not any(manifests):
            return
        for rank, manifest in enumerate(manifests):
            if manifest is not None:
                found = _sent(bucket, rank, manifest, ranks, receivers, room)
                if is_receiver:
                    assert found is not None
                    yield found


def _sent(
    own: Bucket | None, sender: int, manifest: Mapping[str, Any], ranks: Ranks, receivers: Receivers, room: Room
) -> Bucket | None:
    """A sender's bucket, on the receivers and the sender."""
    is_sender = sender == ranks.rank
    data = own.data if is_sender and own is not None else room.next()[: manifest["size"]]
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if receivers == "all":
        dist.broadcast(flat, src=sender)
    elif sender != 0 and is_sender:
        dist.send(flat, dst=0)
    elif sender != 0 and ranks.is_main:
        dist.recv(flat, src=sender)
    if is_sender:
        return own
    return Bucket.of(manifest, data) if receivers == "all" or ranks.is_main else None
