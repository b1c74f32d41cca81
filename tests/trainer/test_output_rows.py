"""Predictions without weight: their logits are not computed, and losses and gradients are as if they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run


def trained(run_dir: str, everywhere: bool) -> list[tuple[int, int, int, int]]:
    """Trains one rank; of each of its losses: rows of logits, rows of the last dense MLP (0 without one), positions of
    weight, positions of the row."""
    from megatron.core.transformer.mlp import MLP

    from megabatch.trainer import engine
    from megabatch.trainer.readouts.tokens import Tokens

    seen: list[tuple[int, int, int, int]] = []
    real, forward, last = Tokens.__call__, MLP.forward, 0

    def counted(self: Any, hidden: Any, *others: Any, **named: Any) -> Any:
        nonlocal last
        last = len(hidden)
        return forward(self, hidden, *others, **named)

    def noted(self: Any, output: Any, pack: Any, split: Any) -> Any:
        seen.append((len(output), last, int((pack.weights_T != 0).sum()), len(pack.ids_T)))
        return real(self, output, pack, split)

    Tokens.__call__, MLP.forward = noted, counted  # type: ignore[method-assign]
    if everywhere:
        engine.can_leave_out_rows = lambda *_: False  # type: ignore[attr-defined]
    assert train(run_dir) == 0
    return seen


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, tuple[int, str, dict[str, dict[str, Any]]]] = {
    "alone": (1, "qwen3", {}),
    "experts": (1, "qwen3_moe", {}),
    "recomputed": (1, "qwen3", {"recompute": FULL}),
    "tp2": (2, "qwen3", {"parallel": {"tensor_model_parallel_size": 2}}),
    "tp2_sp": (2, "qwen3", {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "cp2": (2, "qwen3", {"parallel": {"context_parallel_size": 2}}),
    "pp2": (2, "qwen3", {"parallel": {"pipeline_model_parallel_size": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_only_weighted_predictions_are_computed(case: str, ranks: RankServer, tmp_path: Path) -> None:
    size, model, groups = CASES[case]
    curves = []
    for everywhere in (True, False):
        made = recipe(tmp_path, model, **groups, resources={"tasks_per_node": size})
        run = write_run(made, tmp_path / f"everywhere-{everywhere}")
        found = ranks.run(trained, world_size=size, run_dir=str(run), everywhere=everywhere)
        seen = [one for rank in found for one in rank]
        assert seen and all(weighted < positions for *_, weighted, positions in seen)
        if everywhere or case == "tp2_sp":
            assert all(computed == positions for computed, *_, positions in seen)
        else:
            assert all(computed == max(weighted, 1) for computed, _, weighted, _ in seen)
        if not everywhere and case not in ("tp2_sp", "experts", "recomputed"):
            assert all(rows == computed for computed, rows, *_ in seen)
        curves.append([value for step in curve(run) + evaluations(run) for value in step])
    assert len(curves[0]) > 12 and curves[1] == pytest.approx(curves[0], rel=1e-5)
