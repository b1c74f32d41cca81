"""Overlaps, dispatchers and balancing of experts compute what one process computes on rows without padding.

Adam with an epsilon that is large beside the gradients moves each weight by about the gradient times the learning
rate, so that the exported weights show the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, evaluations, recipe, train_in_buckets, write_run
from safetensors.torch import load_file

STEPS = 2
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
VPP = {**PP, "num_virtual_stages_per_pipeline_rank": 2}

OVERLAPS: dict[str, dict[str, bool]] = {
    "plain": {"use_distributed_optimizer": False},
    "plain_grad": {"use_distributed_optimizer": False, "overlap_grad_reduce": True},
    "distributed": {},
    "distributed_grad": {"overlap_grad_reduce": True},
    "distributed_both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
DISPATCHERS = ("alltoall", "allgather")

BALANCING: dict[str, dict[str, Any]] = {
    "losses": {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05},
    "capacity": {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05, "moe_expert_capacity_factor": 0.8},
    "position": {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "position"},
}


@dataclass(frozen=True)
class Case:
    reference: str
    """The run of one process that it must agree with: dense, or a way of balancing."""
    world_size: int
    groups: dict[str, dict[str, Any]]


CAPACITY: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "ep2": (2, ("allgather",), EP),  # alltoall with padded capacities
    "tp2_ep2": (2, ("allgather",), {**TP, **EP}),  # alltoall with the other ways of balancing
    "tp2_etp2": (2, DISPATCHERS, {**TP, "expert_tensor_parallel_size": 2}),
    "tp2_pp2_vpp2": (4, DISPATCHERS, {**TP, **VPP}),
    "tp2_ep2_dp2": (4, ("allgather",), {**TP, **EP}),
    "tp2_ep4": (4, ("alltoall",), {**TP, "expert_model_parallel_size": 4}),
    "ep2_pp2": (4, ("allgather",), {**EP, **PP}),
    "cp2_ep2": (2, ("alltoall",), {**CP, **EP}),
    "cp2_tp2_ep4": (4, ("allgather",), {**CP, **TP, "expert_model_parallel_size": 4}),
    "cp2_pp2_vpp2": (4, ("alltoall",), {**CP, **VPP}),
}
"""Layouts with experts of a capacity: ranks, dispatchers, sizes."""
RECOMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("alltoall", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "moe": ("allgather", {"recompute_modules": ["moe"]}),
}


def _cases() -> Iterator[tuple[str, Case]]:
    for number, (overlap, settings) in enumerate(OVERLAPS.items()):
        dispatcher = DISPATCHERS[number % 2]
        yield f"losses-ep2-{dispatcher}-{overlap}", _experts("losses", 2, dispatcher, {**EP, **settings})
    # embeddings that the first and the last stage share
    uneven = {**PP, "decoder_first_pipeline_num_layers": 3, **OVERLAPS["distributed_both"]}
    yield "dense-dp2_pp2_uneven-distributed_both", Case("dense", 4, {"parallel": uneven})
    # two groups of query heads: two ranks share each
    yield "losses-tp4_ep2", _experts("losses", 4, "alltoall", {**TP, **EP, "tensor_model_parallel_size": 4})
    yield "losses-cp2_ep2-allgather", _experts("losses", 2, "allgather", {**CP, **EP, **OVERLAPS["distributed_both"]})
    yield "losses-cp2_tp2-alltoall", _experts("losses", 4, "alltoall", {**CP, **TP, **OVERLAPS["plain_grad"]})
    # experts over two replicas, whose rows are equally long
    yield "losses-cp2_ep4-allgather", _experts("losses", 4, "allgather", {**CP, "expert_model_parallel_size": 4})
    for layout, (world_size, dispatchers, parallel) in CAPACITY.items():
        for dispatcher in dispatchers:
            yield f"capacity-{layout}-{dispatcher}", _experts("capacity", world_size, dispatcher, parallel)
    yield "position-tp2_ep2-alltoall", _experts("position", 2, "alltoall", {**TP, **EP})
    yield "position-cp2-alltoall", _experts("position", 2, "alltoall", CP)
    for layout, parallel in (("dp2", {}), ("ep2", EP)):
        case = _experts("capacity", 2, "alltoall", parallel)
        padded = {"moe": {**case.groups["moe"], "moe_pad_expert_input_to_capacity": True}}
        yield f"capacity-{layout}-padded", Case("capacity", 2, {**case.groups, **padded})
    for name, (dispatcher, recompute) in RECOMPUTED.items():
        yield f"capacity-tp2-recompute_{name}", _experts("capacity", 2, dispatcher, TP, recompute=recompute)
        yield f"capacity-cp2-recompute_{name}", _experts("capacity", 2, dispatcher, CP, recompute=recompute)


def _experts(
    balancing: str, world_size: int, dispatcher: str, parallel: dict[str, Any], **groups: dict[str, Any]
) -> Case:
    moe = {**BALANCING[balancing], "moe_token_dispatcher_type": dispatcher}
    return Case(balancing, world_size, {"parallel": parallel, "moe": moe, **groups})


CASES = dict(_cases())


def compute(
    ranks: RankServer, folder: Path, name: str, reference: str, world_size: int, groups: dict[str, dict[str, Any]]
) -> Path:
    made = recipe(
        folder,
        "qwen2" if reference == "dense" else "qwen3_moe",
        **groups,
        training={"train_iters": STEPS},
        batch={"global_batch_size": 4},
        learning_rate={"lr": 0.3, "min_lr": 0.3},
        optimizer={"adam_eps": 1.0, "weight_decay": 0.0, "clip_grad": 0.0},
        checkpoint={"no_save_optim": True},
        evaluation={"eval_on_start": False, "eval_interval": STEPS},
        resources={"tasks_per_node": world_size},
    )
    run = write_run(made, folder / name)
    cache = str(folder / "cache")  # of tokens, which are the same for all
    outcomes = ranks.run(train_in_buckets, world_size=world_size, run_dir=str(run), bucket_size=3000, cache=cache)
    assert set(outcomes) == {0}
    return run


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("matrix")
    found = {name: compute(ranks, folder, name, name, 1, {"moe": moe}) for name, moe in BALANCING.items()}
    return {"dense": compute(ranks, folder, "dense", "dense", 1, {}), **found}


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = (run / "checkpoints" / f"step_{STEPS:08d}" / "hf").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_one_process_and_every_combination_agree(name: str, ranks: RankServer, references: dict[str, Path]) -> None:
    case = CASES[name]
    reference = references[case.reference]
    run = compute(ranks, reference.parent, f"{name}, run", case.reference, case.world_size, case.groups)
    assert len(curve(run)) == STEPS
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(curve(run), curve(reference), strict=True):
        assert (step, loss, norm) == (
            step,
            pytest.approx(expected_loss, rel=2e-6),
            pytest.approx(expected_norm, rel=2e-6),
        )
    assert evaluations(run) == [(STEPS, pytest.approx(evaluations(reference)[0][1], rel=2e-6))]
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert (found[tensor] - expected[tensor]).abs().max() < 2e-6, tensor
