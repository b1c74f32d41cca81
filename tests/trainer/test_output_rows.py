"""Predictions without weight: their logits are not computed, and losses and gradients are as if they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run


def trained(run_dir: str, everywhere: bool) -> list[tuple[int, int, int]]:
    """Trains one rank; of each of its losses: rows of logits, positions of weight, positions of the row."""
    from megabatch.trainer import engine
    from megabatch.trainer.readouts.tokens import Tokens

    seen: list[tuple[int, int, int]] = []
    real = Tokens.__call__

    def noted(self: Any, output: Any, pack: Any, split: Any) -> Any:
        seen.append((len(output), int((pack.weights_T != 0).sum()), len(pack.ids_T)))
        return real(self, output, pack, split)

    Tokens.__call__ = noted  # type: ignore[method-assign]
    if everywhere:
        engine.can_leave_out_rows = lambda *_: False  # type: ignore[attr-defined]
    assert train(run_dir) == 0
    return seen


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_weighted_predictions_are_computed(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    size, parallel = LAYOUTS[layout]
    curves = []
    for everywhere in (True, False):
        groups: dict[str, dict[str, Any]] = {"parallel": parallel, "resources": {"tasks_per_node": size}}
        run = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / f"everywhere-{everywhere}")
        found = ranks.run(trained, world_size=size, run_dir=str(run), everywhere=everywhere)
        rows = [one for rank in found for one in rank]
        assert rows and all(weighted < positions for _, weighted, positions in rows)
        if everywhere or parallel.get("sequence_parallel"):
            assert all(computed == positions for computed, _, positions in rows)
        else:
            assert all(computed == max(weighted, 1) for computed, weighted, _ in rows)
        curves.append([value for step in curve(run) + evaluations(run) for value in step])
    assert len(curves[0]) > 12 and curves[1] == pytest.approx(curves[0], rel=1e-5)
