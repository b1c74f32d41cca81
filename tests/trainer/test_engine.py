"""Micro-batches without samples, which fill up a round, count in no mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run
from safetensors.torch import load_file

from megabatch.trainer.engine import empty_undone

STEPS = 2
BALANCING = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05}


def train_with_empty(run_dir: str, empty: int) -> int:
    """Trains one rank, with so many micro-batches without samples behind those of each step."""
    from megabatch.data.schedule import Interleaving

    rounds = Interleaving.rounds
    Interleaving.rounds = lambda self, needed: rounds(self, needed) + empty  # type: ignore[method-assign]
    return train(run_dir)


def _run(
    ranks: RankServer,
    folder: Path,
    name: str,
    model: str,
    *,
    world_size: int,
    empty: int = 0,
    per_token: bool = False,
    **groups: Any,
) -> Path:
    made = recipe(
        folder,
        model,
        **{**groups, "batch": {"micro_batch_size": 1, **groups.get("batch", {})}},
        training={"train_iters": STEPS, "calculate_per_token_loss": per_token},
        # with an epsilon that is large beside the gradients, weights move by about the gradient
        learning_rate={"lr": 0.3, "min_lr": 0.3},
        optimizer={"adam_eps": 1.0, "weight_decay": 0.0, "clip_grad": 0.0},
        checkpoint={"no_save_optim": True},
        evaluation={"eval_on_start": False, "eval_interval": STEPS},
        resources={"tasks_per_node": world_size},
    )
    run = write_run(made, folder / name)
    assert set(ranks.run(train_with_empty, world_size=world_size, run_dir=str(run), empty=empty)) == {0}
    return run


def _weights(run: Path) -> dict[str, torch.Tensor]:
    files = (run / "checkpoints" / f"step_{STEPS:08d}" / "hf").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_the_mean_over_filled_micro_batches_by_hand() -> None:
    """Losses 3, 5 and 7 of three filled micro-batches on two ranks of two: megatron-core's mean is 15 / 4, ours 5."""
    undone = empty_undone(micro_batches=2, dp_size=2, filled=3)
    assert undone * ((3 / 2 + 5 / 2) + (7 / 2 + 0 / 2)) / 2 == 5.0
    assert empty_undone(micro_batches=4, dp_size=2, filled=8) == 1.0


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "alone": (1, 3, {}),
    "dp2": (2, 1, {}),
    "ep2": (2, 1, {"expert_model_parallel_size": 2}),
    "cp2": (2, 1, {"context_parallel_size": 2}),
    "tp2_sp": (2, 1, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_vpp2": (2, 2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}


@pytest.fixture(scope="module", params=[True, False], ids=["per_token", "per_micro_batch"])
def reference(
    request: pytest.FixtureRequest, ranks: RankServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Path]:
    """One process without an empty micro-batch."""
    folder = tmp_path_factory.mktemp("engine")
    groups = {"moe": BALANCING, "per_token": request.param}
    return request.param, _run(ranks, folder, "reference", "qwen3_moe", world_size=1, **groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_micro_batches_change_nothing(layout: str, ranks: RankServer, reference: tuple[bool, Path]) -> None:
    """Neither the loss by tokens or by micro-batches, nor the losses of the experts' balance and of the router."""
    per_token, expected = reference
    world_size, empty, parallel = LAYOUTS[layout]
    groups = {"moe": BALANCING, "parallel": parallel, "per_token": per_token}
    run = _run(ranks, expected.parent, layout, "qwen3_moe", world_size=world_size, empty=empty, **groups)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(run), curve(expected), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=2e-6), pytest.approx(its_norm, rel=2e-6)), f"step {step}"
    assert evaluations(run) == [(STEPS, pytest.approx(evaluations(expected)[0][1], rel=2e-6))]
    found, wanted = _weights(run), _weights(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() < 2e-6, name


def test_groups_of_an_interleaved_pipeline_that_a_batch_does_not_fill(ranks: RankServer, tmp_path: Path) -> None:
    """5 micro-batches in groups of 3; of the 7 validation samples the last 2, for which a group is filled up."""
    groups: dict[str, Any] = {"batch": {"global_batch_size": 5}}
    expected = _run(ranks, tmp_path, "alone", "qwen2", world_size=1, **groups)
    parallel = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    parallel["microbatch_group_size_per_virtual_pipeline_stage"] = 3
    run = _run(ranks, tmp_path, "groups", "qwen2", world_size=2, empty=0, parallel=parallel, **groups)
    assert [loss for _, loss, _ in curve(run)] == pytest.approx([x for _, x, _ in curve(expected)], rel=2e-6)
    assert [norm for _, _, norm in curve(run)] == pytest.approx([x for _, _, x in curve(expected)], rel=2e-6)
    assert evaluations(run) == [(STEPS, pytest.approx(evaluations(expected)[0][1], rel=2e-6))]
