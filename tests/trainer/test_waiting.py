"""Ranks that wait for others longer than a collective may take, and ranks that one which failed leaves behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from rank_server import RankServer

from megabatch.errors import RolloutError


def slow() -> list[str]:
    """A rank works for longer than the limit of collectives while the other waits."""
    from datetime import timedelta

    import torch.distributed as dist

    from megabatch.trainer.ranks import Ranks

    def works(rank: int, *, late: int) -> str:
        if rank == late:
            threading.Event().wait(2.0)
        return f"of {rank}"

    dist.init_process_group("gloo")
    with Ranks() as ranks:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1.5), dist.group.WORLD)
        found = [ranks.on_main(lambda: works(ranks.rank, late=0)), ranks.each(lambda: works(ranks.rank, late=-1))]
    with Ranks() as ranks:  # of the same world: they do not read each other's words
        return [*found, *(ranks.each(lambda late=late: works(ranks.rank, late=late)) for late in (-1, 1))]


def test_ranks_wait_longer_than_a_collective_may_take(ranks: RankServer) -> None:
    mine, others = ranks.run(slow, world_size=2)
    assert mine == ["of 0"] * 4 and others == ["of 0", "of 1", "of 1", "of 1"]


def leaves_others_behind(folder: str, how: str) -> None:
    """Rank 1 waits for rank 0 in a collective that is not ours, or in ours, and rank 0 never comes."""
    import torch.distributed as dist

    from megabatch.trainer.ranks import Ranks

    words = os.open(f"{folder}/{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    os.dup2(words, 2)
    with Ranks() as ranks:
        group = dist.new_group([0, 1])

        def action() -> None:
            if ranks.rank == 1:
                dist.barrier(group)
            elif how == "fails":
                raise RolloutError("no memory")
            os.kill(os.getpid(), signal.SIGKILL)

        ranks.each(action) if how == "fails" else ranks.on_main(action)


def test_a_rank_that_fails_takes_those_along_that_wait_for_it(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 of 2: Traceback(.|\n)*RolloutError: no memory"):
        ranks.run(leaves_others_behind, world_size=2, folder=str(tmp_path), how="fails")
    assert (tmp_path / "1").read_text().splitlines()[-1] == "error: rank 0 failed: no memory"


def test_the_main_ranks_death_frees_those_that_wait(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: Traceback(.|\n)*DistNetworkError"):
        ranks.run(leaves_others_behind, world_size=2, folder=str(tmp_path), how="dies")
