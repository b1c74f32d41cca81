"""Which layers each pipeline stage holds, split as megatron-core does."""

from __future__ import annotations

from collections.abc import Sequence

from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The part of the model that one virtual stage of one pipeline rank holds."""

    pp_rank: int
    vp_stage: int
    layers: tuple[int, ...]
    """Transformer layers, counted from 0 over the whole model."""
    embedding: bool
    loss: bool
    mtp_layers: int = 0


def even_counts(num_layers: int, *, pp: int, vp: int, embedding: bool = False, loss: bool = False) -> list[int]:
    """Layers of each chunk in the order in which a token meets them, where `embedding` and `loss` count as layers.

    The caller has checked that pp * vp divides `num_layers + embedding + loss`.
    """
    counts = [(num_layers + embedding + loss) // (pp * vp)] * (pp * vp)
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def uneven_counts(num_layers: int, *, pp: int, vp: int, first: int | None, last: int | None) -> list[int]:
    """Layers of each chunk if the first and the last stage have their own numbers and the others share the rest.

    The caller has checked that the other stages' number divides the rest, and that vp divides each stage's layers.
    """
    left = pp - (first is not None) - (last is not None)
    middle = (num_layers - (first or 0) - (last or 0)) // left if left else 0
    stages = [middle] * left
    if first is not None:
        stages.insert(0, first)
    if last is not None:
        stages.append(last)
    return [stage // vp for stage in stages] * vp


def chunks_of_counts(counts: Sequence[int], *, pp: int) -> tuple[Chunk, ...]:
    """Numbers the layers through chunks with these counts; chunk i is on pipeline rank i % pp."""
    return chunks_of_stages(
        ["E" * (i == 0) + "t" * count + "L" * (i == len(counts) - 1) for i, count in enumerate(counts)], pp=pp
    )


def chunks_of_stages(stages: Sequence[str], *, pp: int) -> tuple[Chunk, ...]:
    """The chunks of a parsed pipeline layout (`pipeline_layout.parse`); stage i is on pipeline rank i % pp."""
    chunks: list[Chunk] = []
    layer = 0
    for i, letters in enumerate(stages):
        count = letters.count("t")
        chunks.append(
            Chunk(
                pp_rank=i % pp,
                vp_stage=i // pp,
                layers=tuple(range(layer, layer + count)),
                embedding="E" in letters,
                loss="L" in letters,
                mtp_layers=letters.count("m"),
            )
        )
        layer += count
    return tuple(chunks)
