"""Which experts tokens go to: recorded in one pass over rows, and replayed in another.

Routing is a choice of the largest scores. Where two are nearly equal, rounding decides, so that a pass over other rows
or on another layout may choose another expert, and the log-probabilities of a token jump. Replay (R2 of
arXiv:2510.11370) takes the choices of the pass in which old log-probabilities were computed; the weights of the chosen
experts are the router's own as it is, and learn as ever. Balancing losses are those of the router's own choices.

Rows of a pass lie end to end in a table: S tokens of all rows, L layers, K experts of a token. A token travels through
the model with its place in that table, in the argument that otherwise says what is padding (`megatron_moe.Experts`);
layers that are computed again in the backward pass get it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.megatron_moe import Router

if TYPE_CHECKING:
    from megabatch.trainer.model.build import Model
    from megabatch.trainer.pack import Pack
    from megabatch.trainer.ranks import Ranks

ROUTES, PLACES = "routes", "places"
"""Token columns: the experts of each token, [T, L, K], and the place of each token in the table, int64 [T]."""


@dataclass(frozen=True, slots=True)
class Table:
    """The routes of a pass."""

    experts_SLK: Tensor
    """int64."""
    records: bool
    """Whether choices are written to it, or read from it."""


def placed(packs: Sequence[Pack]) -> list[Pack]:
    """The packs, whose tokens know their places instead of their routes."""
    found, first = [], 0
    for pack in packs:
        places_T = torch.arange(first, first + len(pack.ids_T))
        others = {name: values for name, values in pack.token_columns.items() if name != ROUTES}
        found.append(replace(pack, token_columns={**others, PLACES: places_T}))
        first += len(pack.ids_T)
    return found


def given(packs: Sequence[Pack], device: torch.device) -> Table | None:
    """The routes that the packs bring; None where they bring none."""
    if ROUTES not in packs[0].token_columns:
        return None
    return Table(torch.cat([pack.token_columns[ROUTES] for pack in packs]).to(device, torch.int64), records=False)


def empty(packs: Sequence[Pack], model: Model, device: torch.device) -> Table:
    """To be filled by a pass over these packs."""
    size = (sum(len(pack.ids_T) for pack in packs), model.config.num_layers, model.config.moe_router_topk)
    return Table(torch.zeros(size, dtype=torch.int64, device=device), records=True)


def recorded(table: Table, packs: Sequence[Pack], ranks: Ranks) -> list[Tensor]:
    """The routes of each pack, [T, L, K], on every rank that shares the model or the rows; collective over them.

    A rank has written those of its layers and of its part of each row; elsewhere it has 0, the smallest of all.
    """
    for group, size in (
        (ranks.state.get_model_parallel_group(), ranks.tp_size * ranks.pp_size),
        (ranks.cp, ranks.cp_size),
    ):
        if size > 1:
            dist.all_reduce(table.experts_SLK, op=dist.ReduceOp.MAX, group=group)
    return list(table.experts_SLK.split([len(pack.ids_T) for pack in packs]))


@contextmanager
def routed(model: Model, table: Table | None) -> Iterator[None]:
    """Inside this context the model's routers record to the table, or take their choices from it."""
    routers = [module for chunk in model.chunks for module in chunk.modules() if isinstance(module, Router)]
    for router in routers:
        router.routes = table
    try:
        yield
    finally:
        for router in routers:
            router.routes = None
