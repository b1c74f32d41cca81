"""Losses and gradient norms of compositions are those of one process; `tests/matrix.py --scores` has more tasks."""

from __future__ import annotations

from pathlib import Path

from composed import TOLERANCE, Composed
from rank_server import RankServer
from scored import COMPOSITIONS, recipe_of, write_rows


def test_losses_and_gradient_norms_are_those_of_one_process(ranks: RankServer, tmp_path: Path) -> None:
    task = "generative_reranker"
    write_rows(task, tmp_path)
    composed = Composed(ranks, tmp_path, recipe_of=recipe_of(task))
    (found,) = composed.deviations(COMPOSITIONS)
    assert len(found) == len(COMPOSITIONS)
    far = {name: one for name, one in found.items() if not one.largest <= TOLERANCE}
    assert not far
