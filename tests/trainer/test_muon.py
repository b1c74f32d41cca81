"""Muon's updates are those of an fp64 reference: alone, split over ranks, and beside AdamW in a whole run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from muon_reference import AdamW64, Array, Muon64
from rank_server import RankServer
from runs import recipe, train, write_run

from megabatch.trainer.muon import Matrix, Muon, Rule

GROUPS, QUERIES, SIZE = 3, 2, 2
"""Query groups, query heads of a group and head size of a small attention: 24 fused rows."""


def _rule(**given: Any) -> Rule:
    plain: dict[str, Any] = {
        "momentum": 0.9,
        "use_nesterov": False,
        "scale_mode": "spectral",
        "extra_scale_factor": 1.0,
        "coefficient_type": "quintic",
        "num_ns_steps": 5,
        "fp32_matmul_prec": "highest",
        "tp_mode": "duplicated",
    }
    return Rule(**{**plain, **given})


def _parts() -> tuple[torch.Tensor, ...]:
    rows = torch.arange(GROUPS * (QUERIES + 2) * SIZE).view(GROUPS, QUERIES + 2, SIZE)
    return tuple(part.reshape(-1) for part in (rows[:, :QUERIES], rows[:, QUERIES], rows[:, QUERIES + 1]))


def _draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def _updated(rule: Rule, matrix: Matrix, value: Array, gradients: list[Array]) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float32))
    muon = Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.2}], rule, {parameter: matrix})
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        muon.step()
    return parameter.detach()


def _expected(reference: Muon64, value: Array, gradients: list[Array]) -> Array:
    for gradient in gradients:
        value = reference.update(value, gradient, lr=0.1, decay=0.2)
    return value


def _difference(found: Any, expected: Array, start: Array) -> float:
    """Largest, in parts of the largest change."""
    return float(np.abs(np.asarray(found, dtype=np.float64) - expected).max() / np.abs(expected - start).max())


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ({}, {}),
        ({"use_nesterov": True}, {"nesterov": True}),
        ({"momentum": 0.0, "use_nesterov": True}, {"momentum": 0.0}),
        ({"scale_mode": "unit_rms_norm", "extra_scale_factor": 0.2}, {"mode": "unit_rms_norm", "factor": 0.2}),
        ({"scale_mode": "shape_scaling"}, {"mode": "shape_scaling"}),
        ({"coefficient_type": "simple"}, {"kind": "simple"}),
        ({"num_ns_steps": 7}, {"steps": 7}),
    ],
)
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (9, 9), (1, 8)])
def test_updates_are_those_of_the_paper(
    rule: dict[str, Any], reference: dict[str, Any], shape: tuple[int, int]
) -> None:
    start, gradients = _draw(*shape, seed=0), [_draw(*shape, seed=seed) for seed in (1, 2, 3)]
    expected = _expected(Muon64(**{"momentum": 0.9, **reference}), start, gradients)
    assert _difference(_updated(_rule(**rule), Matrix(), start, gradients), expected, start) < 1e-4


@pytest.mark.parametrize("steps", [3, 6])
def test_coefficients_of_the_polar_express_are_its_papers(steps: int) -> None:
    """Four decimals of them, as NVIDIA's emerging_optimizers has them."""
    start, gradient = _draw(8, 24, seed=0), _draw(8, 24, seed=1)
    expected = _expected(Muon64(kind="polar_express", steps=steps), start, [gradient])
    rule = _rule(coefficient_type="polar_express", num_ns_steps=steps)
    assert _difference(_updated(rule, Matrix(), start, [gradient]), expected, start) < 3e-3


def test_the_polar_express_repeats_its_last_step() -> None:
    """(15x - 10x^3 + 3x^5) / 8 has the fixed point 1: more steps bring every singular value there."""
    x = torch.tensor(_draw(6, 12, seed=1), dtype=torch.float32)
    made = _rule(coefficient_type="polar_express", num_ns_steps=16).orthogonalized(x)
    assert torch.linalg.svdvals(made).numpy() == pytest.approx(np.ones(6), abs=1e-4)
    polar = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(made, polar.U @ polar.Vh, atol=1e-4)


def test_queries_keys_and_values_are_a_matrix_each() -> None:
    shape = (GROUPS * (QUERIES + 2) * SIZE, 10)
    start, gradients = _draw(*shape, seed=0), [_draw(*shape, seed=seed) for seed in (1, 2)]
    apart = _expected(Muon64(momentum=0.9, heads=(GROUPS, QUERIES, SIZE)), start, gradients)
    assert _difference(_updated(_rule(), Matrix(parts=_parts()), start, gradients), apart, start) < 1e-4
    fused = _expected(Muon64(momentum=0.9), start, gradients)
    assert _difference(fused, apart, start) > 0.1


def test_bfloat16_products_stay_near() -> None:
    start, gradients = _draw(24, 40, seed=0), [_draw(24, 40, seed=seed) for seed in (1, 2)]
    expected = _expected(Muon64(momentum=0.9), start, gradients)
    difference = _difference(_updated(_rule(fp32_matmul_prec="medium"), Matrix(), start, gradients), expected, start)
    assert 1e-4 < difference < 3e-2


def test_a_matrix_without_gradient_only_decays() -> None:
    """An expert to which no token went."""
    start = _draw(6, 4, seed=0)
    found = _updated(_rule(), Matrix(), start, [np.zeros((6, 4))])
    assert found.numpy() == pytest.approx(start * (1 - 0.1 * 0.2), rel=1e-6)


def split_updates(cases: list[dict[str, Any]]) -> list[Array]:
    """This rank's part of each updated matrix."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = []
    for case in cases:
        dim, rank, ways = case["split"], dist.get_rank(), dist.get_world_size()
        own = [np.split(array, ways, axis=dim)[rank] for array in (case["start"], *case["gradients"])]
        matrix = Matrix(dim, dist.group.WORLD, _parts() if case["fused"] else ())
        found.append(_updated(_rule(**case["rule"]), matrix, own[0], own[1:]).numpy())
    dist.destroy_process_group()
    return found


def test_ranks_that_split_a_matrix(ranks: RankServer) -> None:
    """Four ranks have six fused rows each, of whatever heads these are. Blockwise, each rank's part is a matrix."""
    cases, expected = [], []
    for mode in ("duplicated", "distributed", "blockwise"):
        for split, shape in ((0, (24, 8)), (0, (8, 24)), (1, (24, 8)), (1, (8, 24))):
            for fused in (False, True) if shape[0] == 24 else (False,):
                start, gradients = _draw(*shape, seed=0), [_draw(*shape, seed=seed) for seed in (1, 2)]
                rule = {"tp_mode": mode, "scale_mode": "unit_rms_norm", "use_nesterov": True}
                if mode == "blockwise" and fused and split == 0:
                    continue  # its blocks are made by hand below
                cases.append({"split": split, "start": start, "gradients": gradients, "fused": fused, "rule": rule})
                heads = (GROUPS, QUERIES, SIZE) if fused else None
                blocks = [[start, *gradients]]
                if mode == "blockwise":
                    cut = (np.split(array, 4, axis=split) for array in (start, *gradients))
                    blocks = [list(block) for block in zip(*cut, strict=True)]
                parts = []
                for first, *rest in blocks:
                    reference = Muon64(momentum=0.9, nesterov=True, mode="unit_rms_norm", heads=heads)
                    parts.append(_expected(reference, first, rest))
                expected.append(np.concatenate(parts, axis=split))
    found = ranks.run(split_updates, world_size=4, cases=cases)
    for number, (case, whole) in enumerate(zip(cases, expected, strict=True)):
        joined = np.concatenate([of_rank[number] for of_rank in found], axis=case["split"])
        assert _difference(joined, whole, case["start"]) < 1e-4, case["rule"]["tp_mode"]


def test_rows_of_a_rank_are_those_of_its_heads(ranks: RankServer) -> None:
    """Blockwise, three ranks have one group each: query heads, key and value are a matrix each, of that group."""
    shape = (24, 8)
    start, gradients = _draw(*shape, seed=0), [_draw(*shape, seed=1)]
    case = {"split": 0, "start": start, "gradients": gradients, "fused": True, "rule": {"tp_mode": "blockwise"}}
    found = ranks.run(split_updates, world_size=3, cases=[case])
    for rank, (part,) in enumerate(found):
        own = slice(8 * rank, 8 * rank + 8)
        reference = Muon64(momentum=0.9, heads=(1, QUERIES, SIZE))
        whole = _expected(reference, start[own], [gradients[0][own]])
        assert _difference(part, whole, start[own]) < 1e-4


def recorded(run_dir: str) -> list[dict[str, tuple[Any, Any, Any]]]:
    """Trains one rank. Returns: of each step and parameter, the main value before, the gradient and the value after,
    by the table's name and the expert, and the gradient's norm under `norm`."""
    from megabatch.trainer.matrices import model_parameters
    from megabatch.trainer.optimizer import Optimizer
    from megabatch.trainer.weights import placed

    steps: list[dict[str, tuple[Any, Any, Any]]] = []
    init, update = Optimizer.__init__, Optimizer.update
    named: dict[str, Any] = {}

    def made(self: Optimizer, model: Any, **given: Any) -> None:
        init(self, model, **given)
        mains = {own: main for inner in self.inner for main, own in model_parameters(inner).items()}
        for item in placed(model, given["table"], model.ranks):
            key = item.mapped.name if item.mapped.expert is None else f"{item.mapped.name}[{item.mapped.expert}]"
            named[key] = (mains.get(item.parameter, item.parameter), item.parameter)

    def updated(self: Optimizer, grad_norm: float) -> None:
        seen = {key: (main.detach().double().numpy(), main.grad.double().numpy()) for key, (main, _) in named.items()}
        update(self, grad_norm)
        steps.append({key: (*seen[key], main.detach().double().numpy()) for key, (main, _) in named.items()})
        for main, own in named.values():
            assert torch.equal(own, main.to(own.dtype)), "the model has the rounded main parameters"
        steps[-1]["norm"] = (grad_norm, None, None)

    Optimizer.__init__, Optimizer.update = made, updated  # type: ignore[method-assign]
    assert train(run_dir) == 0
    return steps


HIDDEN = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", "router.weight")
ADAM = 5e-3, 1e-4
"""Learning rates of `runs.recipe`, the first and the last."""


def _reference(name: str, optimizer: dict[str, Any]) -> Muon64 | AdamW64:
    if not name.split("[", maxsplit=1)[0].endswith(HIDDEN):
        return AdamW64()
    split = optimizer.get("muon_split_qkv", True) and name.endswith("linear_qkv.weight")
    return Muon64(
        momentum=optimizer.get("muon_momentum", 0.95),
        nesterov=optimizer.get("muon_use_nesterov", False),
        factor=optimizer["muon_extra_scale_factor"],
        heads=(2, 2, 8) if split else None,
    )


@pytest.mark.parametrize(
    ("model", "dtype", "more"),
    [
        ("qwen2", "float32", {"muon_use_nesterov": True}),
        ("qwen2", "bfloat16", {"muon_split_qkv": False, "muon_lr": 2e-2, "muon_min_lr": 1e-3}),
        ("qwen3_moe", "float32", {"muon_momentum": 0.8, "muon_lr": 1e-2}),
        ("qwen3_moe", "float16", {}),
    ],
)
def test_a_run_updates_every_parameter_like_the_reference(
    model: str, dtype: str, more: dict[str, Any], ranks: RankServer, tmp_path: Path
) -> None:
    """Gradients are the run's; clipping, both schedules, weight decay, means and updates are computed again."""
    optimizer: dict[str, Any] = {
        "optimizer": "muon",
        "muon_extra_scale_factor": 0.2,
        "muon_fp32_matmul_prec": "highest",
        "clip_grad": 0.7,
        "weight_decay": 0.3,
        **more,
    }
    run = write_run(
        recipe(
            tmp_path,
            model,
            model={"torch_dtype": dtype},
            optimizer=optimizer,
            parallel={"use_distributed_optimizer": False},
            precision={"initial_loss_scale": 2.0**12},
        ),
        tmp_path / "run",
    )
    [steps] = ranks.run(recorded, world_size=1, run_dir=str(run))
    assert len(steps) == 4
    muon = more.get("muon_lr", ADAM[0]), more.get("muon_min_lr", ADAM[1])
    references = {name: _reference(name, optimizer) for name in steps[0] if name != "norm"}
    values = {name: steps[0][name][0] for name in references}
    assert sum(isinstance(one, Muon64) for one in references.values()) == 4 * (4 if model == "qwen2" else 3 + 2 * 4)
    for number, step in enumerate(steps):
        norm = step["norm"][0]
        assert norm == pytest.approx(math.sqrt(sum((step[name][1] ** 2).sum() for name in references)), rel=1e-5)
        assert norm > 0.7, "or nothing is clipped"
        for name, reference in references.items():
            start, gradient, found = step[name]
            first, last = muon if isinstance(reference, Muon64) else ADAM
            lr = last + (first - last) * (math.cos(math.pi * number / 4) + 1) / 2
            decay = 0.3 if start.ndim == 2 else 0.0
            expected = reference.update(values[name], gradient * (0.7 / (norm + 1e-6)), lr=lr, decay=decay)
            assert _difference(found, expected, values[name]) < 1e-3, (number, name)
            values[name] = found  # the next step's start; the means are the reference's own
