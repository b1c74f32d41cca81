"""Metrics of all ranks, and a stop request of one, without a collective over the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, recipe, train, write_run


def summed(sizes: dict[str, int], stops: int) -> dict[str, Any]:
    """Rank r, where it has something to add, has found r + 1 of 10 and 2 of 5 in two micro-batches."""
    import torch
    import torch.distributed as dist

    from megabatch.trainer.objectives.objective import Mean
    from megabatch.trainer.ranks import Ranks
    from megabatch.trainer.sums import Flags, Sums

    found: dict[str, Any] = {}
    with Ranks(**sizes) as ranks:
        reduce, spans = dist.all_reduce, []

        def noted(values: torch.Tensor, group: Any = None) -> None:
            spans.append(dist.get_world_size(group))
            reduce(values, group=group)

        dist.all_reduce = noted
        sums = Sums(("loss", "other"), ranks)
        whole = {"loss": Mean(torch.tensor(ranks.rank + 1.0), torch.tensor(10.0))}
        other = {"other": Mean(torch.tensor(0.25), torch.tensor(1.0))}
        more = {"loss": Mean(torch.tensor(2.0), torch.tensor(5.0)), **other}
        sums.add([{**whole, **other}, more])
        metrics, flags = sums.reduce(Flags(stop=ranks.rank == stops, writing=ranks.rank == 0)).read()
        dist.all_reduce = reduce
        adds = ranks.is_last_stage and ranks.tp_rank == 0
        loss, rest = metrics["loss"], metrics["other"]
        found = {"loss": (loss.total, loss.count), "other": (rest.total, rest.count), "flags": tuple(flags)}
        found |= {"adds": adds, "spans": spans, "rank": ranks.rank}
    return found


@pytest.mark.parametrize(
    ("world_size", "sizes", "spans"),
    [
        (1, {}, []),
        (2, {}, [2]),
        (2, {"pipeline_model_parallel_size": 2}, [2]),
        (4, {"tensor_model_parallel_size": 2}, [2, 2]),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, [4]),
    ],
)
def test_every_rank_knows_the_sums_and_the_stop(
    world_size: int, sizes: dict[str, int], spans: list[int], ranks: RankServer
) -> None:
    for stops in (-1, world_size - 1):
        found = ranks.run(summed, world_size=world_size, sizes=sizes, stops=stops)
        adding = [one["rank"] for one in found if one["adds"]]
        for one in found:
            assert one["loss"] == (sum(rank + 3.0 for rank in adding), 15.0 * len(adding))
            assert one["other"] == (0.5 * len(adding), 2.0 * len(adding))
            assert one["flags"] == (stops >= 0, True)
            assert one["spans"] == spans


def test_the_gradient_norm_is_known_where_nothing_is_clipped(ranks: RankServer, tmp_path: Path) -> None:
    """A threshold that is never reached and none at all are the same training."""
    curves = []
    for clip in (1e6, 0.0):
        run = write_run(recipe(tmp_path, optimizer={"clip_grad": clip}), tmp_path / f"clip-{clip}")
        assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
        curves.append(curve(run))
    assert curves[0] == curves[1] and curves[0][0][2] > 0
