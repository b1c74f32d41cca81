"""Dropout in training alone: the same masks when recomputed, after a resume, and where ranks have the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run

from megabatch.run_directory import ExitCode

UNSEEN = {"eval_iters": 0}
"""No evaluation, in runs that ask about training alone."""
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


def _make(folder: Path, name: str, layout: str = "dp1", **groups: dict[str, Any]) -> tuple[Path, int]:
    world_size, parallel = LAYOUTS[layout]
    chosen = {"model": DROPOUT, "parallel": parallel, "resources": {"tasks_per_node": world_size}, **groups}
    if "vpp" not in layout:
        chosen["model"] = {"num_layers": 2, **chosen["model"]}
    return write_run(recipe(folder, "qwen3", **chosen), folder / name), world_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_and_resume_draw_the_same_masks(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kept, world_size = _make(tmp_path, "kept", layout, recompute={"recompute_granularity": "none"}, evaluation=UNSEEN)
    again, _ = _make(tmp_path, "again", layout, recompute=full, evaluation=UNSEEN)
    cut, _ = _make(tmp_path, "cut", layout, evaluation=UNSEEN)  # attention alone is recomputed
    for run in (kept, again):
        assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {ExitCode.DONE}
    stopped = ranks.run(train, world_size=world_size, run_dir=str(cut), stop_after=2)
    assert set(stopped) == {ExitCode.REQUEUE}
    ranks.run(train, world_size=world_size, run_dir=str(cut))
    assert curve(again) == curve(kept) == curve(cut)


LORA = {"tuner": {"tuner_type": "lora", "target_modules": ("all-linear",), "lora_dropout": 0.2}, "model": {}}


@pytest.mark.parametrize("groups", [{}, LORA], ids=["full", "lora"])
def test_what_draws_before_the_first_step_changes_no_number(
    groups: dict[str, Any], ranks: RankServer, tmp_path: Path
) -> None:
    """The masks of the first step follow from the seed, those after a resume from the checkpoint, bit for bit."""
    kept, _ = _make(tmp_path, "kept", evaluation=UNSEEN, **groups)
    drawn, _ = _make(tmp_path, "drawn", evaluation={"eval_on_start": True}, **groups)
    assert ranks.run(train, world_size=1, run_dir=str(kept)) == [ExitCode.DONE]
    assert ranks.run(_train_after_draws, world_size=1, run_dir=str(drawn), stop_after=2) == [ExitCode.REQUEUE]
    assert ranks.run(_train_after_draws, world_size=1, run_dir=str(drawn)) == [ExitCode.DONE]
    assert curve(drawn) == curve(kept)


def _train_after_draws(run_dir: str, stop_after: int | None = None) -> int:
    """Trains, drawing from all generators before and after the run is opened."""
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megabatch.trainer import loop

    def draw() -> None:
        random.random()
        np.random.rand()
        torch.rand(7)
        with get_cuda_rng_tracker().fork():
            torch.rand(7)

    opens = loop.open_loop

    def opened(*arguments: Any) -> Any:
        draw()
        found = opens(*arguments)
        draw()
        return found

    loop.open_loop = opened
    return train(run_dir, stop_after)


def test_only_training_drops(ranks: RankServer, tmp_path: Path) -> None:
    plain, _ = _make(tmp_path, "plain", model={})
    curves = []
    for name, dropout in {"attention": {"attention_dropout": 0.2}, "hidden": {"hidden_dropout": 0.2}}.items():
        run, _ = _make(tmp_path, name, model=dropout)
        ranks.run(train, world_size=1, run_dir=str(run))
        curves.append(curve(run))
        assert curve(run)[-1][1] < curve(run)[0][1], "it learns"
    ranks.run(train, world_size=1, run_dir=str(plain))
    assert len({losses[0][1] for losses in (*curves, curve(plain))}) == 3
    assert evaluations(run)[0] == evaluations(plain)[0]


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_what_tensor_parallel_ranks_share_stays_equal(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    run, world_size = _make(tmp_path, "run", layout)
    first, second = ranks.run(_norms_and_generators, world_size=world_size, run_dir=str(run))
    assert first["norms"] == second["norms"], "they have the same tokens' gradients"
    assert first["heads"] != second["heads"], "their heads are others"
    assert first["warnings"] == 0


def _norms_and_generators(run_dir: str) -> dict[str, Any]:
    """Of a rank after training: weights of a norm, what its generator for split tensors draws, megatron's warnings."""
    import logging

    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble, loop
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.signals import StopSignal

    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        opened, progress = loop.open_loop(run, ranks, StopSignal(), Activity(0))
        with opened.metrics:
            opened.run_from(progress)
        layer = opened.engine.model.chunks[0].decoder.layers[1]
        with get_cuda_rng_tracker().fork():
            heads = torch.rand(4).tolist()
        warnings = sum("RNG" in record.getMessage() for record in seen)
        return {"norms": layer.input_layernorm.weight.tolist(), "heads": heads, "warnings": warnings}
