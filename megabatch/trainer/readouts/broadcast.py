"""What the last pipeline stage read, given to the other stages: one collective for any number of packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.readout import Field

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack
    from megabatch.trainer.zigzag import Cut


def on_all_ranks(
    found: Sequence[Mapping[str, Tensor]],
    packs: Sequence[Pack],
    fields: Mapping[str, Field],
    ranks: Ranks,
    *,
    cuts: Sequence[Cut | None],
) -> list[dict[str, Tensor]]:
    """The fields of each whole pack, on every rank.

    Args: `found`: what this rank read from its part of each pack, used only on the last stage; `cuts`: how each pack
    is split over context-parallel ranks.
    """
    order = [(name, number) for name in fields for number in range(len(packs))]
    shapes = [shape_of(packs[number], fields[name]) for name, number in order]
    if ranks.is_last_stage:
        read = [found[number][name].detach().to(fields[name].dtype).view(torch.int32) for name, number in order]
        flat = _flat(read, [cuts[number] if fields[name].per == "token" else None for name, number in order], shapes)
    else:
        flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.int32, device=ranks.device)
    if ranks.pp_size > 1:
        source = ranks.state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(flat, src=source, group=ranks.state.get_pipeline_model_parallel_group())
    out: list[dict[str, Tensor]] = [{} for _ in packs]
    for (name, number), shape, numbers in zip(order, shapes, flat.split([s.numel() for s in shapes]), strict=True):
        out[number][name] = numbers.view(fields[name].dtype).view(shape)
    return out


def shape_of(pack: Pack, field: Field) -> torch.Size:
    """The shape of a field of a whole pack."""
    return torch.Size((len(pack.ids_T) if field.per == "token" else pack.sequences, *field.shape))


def _flat(read: Sequence[Tensor], cuts: Sequence[Cut | None], shapes: Sequence[torch.Size]) -> Tensor:
    """The whole tensors, flattened and concatenated."""
    joined = iter(_joined([(part, cut) for part, cut in zip(read, cuts, strict=True) if cut is not None]))
    whole = [part if cut is None else next(joined) for part, cut in zip(read, cuts, strict=True)]
    for one, shape in zip(whole, shapes, strict=True):
        assert one.shape == shape, f"a readout gave {tuple(one.shape)} where its field says {tuple(shape)}"
    return torch.cat([one.reshape(-1) for one in whole])


def _joined(parts: Sequence[tuple[Tensor, Cut]]) -> list[Tensor]:
    """Joins parts into whole rows, [t, …] → [T, …], with one collective over the ranks that hold them."""
    if not parts:
        return []
    group = parts[0][1].group
    mine = torch.cat([part.reshape(-1) for part, _ in parts])
    everyone = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather_into_tensor(everyone.view(-1), mine, group=group)
    split = everyone.split([part.numel() for part, _ in parts], dim=1)
    return [
        numbers.reshape(-1, *part.shape[1:])[cut.places_T] for numbers, (part, cut) in zip(split, parts, strict=True)
    ]
