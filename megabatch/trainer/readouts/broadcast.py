"""What the last pipeline stage read, given to the other stages: one collective for any number of packs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.readout import Field

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


def on_all_stages(
    found: Sequence[Mapping[str, Tensor]], packs: Sequence[Pack], fields: Mapping[str, Field], ranks: Ranks
) -> list[dict[str, Tensor]]:
    """The fields of each pack, on every stage; `found` is used on the last stage alone, and may be empty elsewhere."""
    shapes = list(_shapes(packs, fields))
    if ranks.is_last_stage:
        parts = [found[i][name].detach().to(field.dtype) for name, field in fields.items() for i in range(len(packs))]
        for part, shape in zip(parts, shapes, strict=True):
            assert part.shape == shape, f"a readout gave {tuple(part.shape)} where its field says {tuple(shape)}"
        flat = torch.cat([part.contiguous().view(torch.int32).view(-1) for part in parts])
    else:
        flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.int32, device=ranks.device)
    if ranks.pp_size > 1:
        source = ranks.state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(flat, src=source, group=ranks.state.get_pipeline_model_parallel_group())
    pieces = iter(flat.split([shape.numel() for shape in shapes]))
    each = iter(shapes)
    out: list[dict[str, Tensor]] = [{} for _ in packs]
    for name, field in fields.items():
        for one in out:
            one[name] = next(pieces).view(field.dtype).view(next(each))
    return out


def _shapes(packs: Sequence[Pack], fields: Mapping[str, Field]) -> Iterator[torch.Size]:
    for field in fields.values():
        for pack in packs:
            yield torch.Size((len(pack.ids_T) if field.per == "token" else pack.sequences, *field.shape))
