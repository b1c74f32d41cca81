"""Runs with Muon: the same curve at every layout, exact resume, resume at another layout, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run

from megabatch.run_directory import ExitCode
from megabatch.trainer.matrices import is_hidden_matrix

MUON: dict[str, Any] = {"optimizer": "muon", "muon_extra_scale_factor": 0.2}
EXACT: dict[str, Any] = {"muon_fp32_matmul_prec": "highest"}
UNSEEN = {"eval_iters": 0}
"""No evaluation, in runs that ask about training alone."""
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2_overlapped": (2, {"overlap_grad_reduce": True}),
    "tp2": (2, TP2),
    "tp4_shared_groups": (4, {"tensor_model_parallel_size": 4}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_ep2_dp2": (4, {**TP2, "expert_model_parallel_size": 2}),
    "tp2_etp2_ep2_dp2": (4, {**TP2, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2}),
    "pp2_ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}
CASES = [
    *[("qwen2", name, {}) for name in ("dp2", "dp2_overlapped", "tp2", "tp4_shared_groups", "pp2_vpp2", "cp2")],
    *[("qwen3_moe", name, {}) for name in ("tp2_ep2_dp2", "tp2_etp2_ep2_dp2", "pp2_ep2", "ep2")],
    *[("qwen2", name, {"muon_tp_mode": "distributed"}) for name in ("tp2", "tp4_shared_groups")],
    ("qwen3_moe", "tp2_etp2_ep2_dp2", {"muon_tp_mode": "distributed"}),
]


def _make(folder: Path, name: str, model: str, layout: str, /, *, optimizer: dict[str, Any], **more: Any) -> Path:
    world_size, parallel = LAYOUTS[layout]
    if model == "qwen3_moe":  # as many layers as two stages need; layers with experts take long
        more["model"] = {"num_layers": 2, **more.get("model", {})}
    made = recipe(
        folder,
        model,
        parallel={"use_distributed_optimizer": False, **parallel},
        optimizer=optimizer if "optimizer" in optimizer else {**MUON, **optimizer},
        resources={"tasks_per_node": world_size},
        **{"evaluation": {"eval_interval": 4}, **more},
    )
    return write_run(made, folder / name)


def _train(ranks: RankServer, run: Path, layout: str, *, stop_after: int | None = None) -> set[int]:
    return set(ranks.run(train, world_size=LAYOUTS[layout][0], run_dir=str(run), stop_after=stop_after))


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process for each model."""
    folder = tmp_path_factory.mktemp("muon")
    found = {model: _make(folder, model, model, "one", optimizer=EXACT) for model in ("qwen2", "qwen3_moe")}
    for run in found.values():
        assert _train(ranks, run, "one") == {ExitCode.DONE}
    return found


@pytest.mark.parametrize(("model", "layout", "optimizer"), CASES)
def test_every_layout_gives_the_same_curve(
    model: str, layout: str, optimizer: dict[str, Any], ranks: RankServer, references: dict[str, Path], tmp_path: Path
) -> None:
    run = _make(tmp_path, "run", model, layout, optimizer={**EXACT, **optimizer})
    assert _train(ranks, run, layout) == {ExitCode.DONE}
    _same_curve(curve(run), curve(references[model]))
    found, expected = evaluations(run), evaluations(references[model])
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def _same_curve(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for (step, loss, norm), (_, its_loss, its_norm) in zip(found, expected, strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-4)), step


def test_it_learns_and_blockwise_computes_other_updates(
    ranks: RankServer, references: dict[str, Path], tmp_path: Path
) -> None:
    blockwise = {**EXACT, "muon_tp_mode": "blockwise"}
    for name in ("one", "tp2"):
        _train(ranks, _make(tmp_path, name, "qwen2", name, optimizer=blockwise), name)
    assert curve(tmp_path / "one") == curve(references["qwen2"]), "ranks split nothing"
    found, expected = curve(tmp_path / "tp2"), curve(references["qwen2"])
    assert found[0][1] == pytest.approx(expected[0][1], rel=1e-6), "before the first update"
    assert abs(found[-1][1] / expected[-1][1] - 1) > 1e-4
    for run in (*references.values(), tmp_path / "tp2"):
        losses = [loss for _, loss in evaluations(run)]
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [("qwen3_moe", "tp2_ep2_dp2", "bfloat16"), ("qwen2", "pp2_vpp2", "float32"), ("qwen2", "cp2", "float16")],
)
def test_stop_and_resume_give_the_uninterrupted_curve_bit_for_bit(
    model: str, layout: str, dtype: str, ranks: RankServer, tmp_path: Path
) -> None:
    groups: dict[str, Any] = {"model": {"torch_dtype": dtype}, "precision": {"initial_loss_scale": 2.0**12}}
    whole, cut = (_make(tmp_path, name, model, layout, optimizer={}, **groups) for name in ("whole", "cut"))
    assert _train(ranks, whole, layout) == {ExitCode.DONE}
    assert _train(ranks, cut, layout, stop_after=2) == {ExitCode.REQUEUE}
    assert _train(ranks, cut, layout) == {ExitCode.DONE}
    assert curve(cut) == curve(whole) and len(curve(cut)) == 4
    assert evaluations(cut) == evaluations(whole)


@pytest.mark.parametrize(
    ("model", "saved", "loaded"),
    [("qwen3_moe", "tp2_etp2_ep2_dp2", "pp2_ep2"), ("qwen3_moe", "pp2_ep2", "one"), ("qwen2", "tp2", "cp2")],
)
def test_another_layout_goes_on_with_the_same_curve(
    model: str, saved: str, loaded: str, ranks: RankServer, references: dict[str, Path], tmp_path: Path
) -> None:
    cut = _make(tmp_path, "cut", model, saved, optimizer=EXACT)
    assert _train(ranks, cut, saved, stop_after=2) == {ExitCode.REQUEUE}
    moved = _make(tmp_path, "moved", model, loaded, optimizer=EXACT, checkpoint={"load": str(cut)})
    assert _train(ranks, moved, loaded) == {ExitCode.DONE}
    _same_curve(curve(moved), curve(references[model])[2:])


def refused(run_dir: str) -> str:
    from megabatch.errors import MegabatchError

    try:
        train(run_dir)
    except MegabatchError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    ("saved", "loads", "words"),
    [
        ("adam", "muon", ["optimizer.optimizer='muon'", "lacks momentum_buffer", "no_load_optim=True"]),
        ("muon", "adam", ["optimizer.optimizer='adam'", "has momentum_buffer"]),
        ("muon", "sgd", ["optimizer.optimizer='sgd'", "has exp_avg and exp_avg_sq"]),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_name(
    saved: str, loads: str, words: list[str], ranks: RankServer, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"model": {"num_layers": 1}, "evaluation": UNSEEN}
    first = _make(tmp_path, "first", "qwen2", "dp2", optimizer={"optimizer": saved}, **small)
    assert _train(ranks, first, "dp2", stop_after=2) == {ExitCode.REQUEUE}
    load: dict[str, Any] = {"load": str(first)}
    again = _make(tmp_path, "again", "qwen2", "dp2", optimizer={"optimizer": loads}, checkpoint=load, **small)
    for error in ranks.run(refused, world_size=2, run_dir=str(again)):
        assert all(word in error for word in words), error
    load["no_load_optim"] = True
    fresh = _make(tmp_path, "fresh", "qwen2", "dp2", optimizer={"optimizer": loads}, checkpoint=load, **small)
    assert _train(ranks, fresh, "dp2") == {ExitCode.DONE}
    assert [step for step, *_ in curve(fresh)] == [3, 4]


@pytest.mark.parametrize(
    "tuner",
    [
        {"freeze_parameters": ["embedding", "decoder.layers.0"]},
        {"freeze_parameters_regex": r".*", "trainable_parameters_regex": r".*norm.*"},
        {"freeze_parameters_regex": r".*", "trainable_parameters_regex": r".*linear_fc2.*"},
    ],
)
def test_a_model_that_is_frozen_in_part(tuner: dict[str, Any], ranks: RankServer, tmp_path: Path) -> None:
    """Without some of the matrices, without any, and with nothing else."""
    curves = []
    for layout in ("dp2", "pp2_vpp2"):
        run = _make(tmp_path, layout, "qwen2", layout, optimizer=EXACT, tuner=tuner, evaluation=UNSEEN)
        assert _train(ranks, run, layout, stop_after=2) == {ExitCode.REQUEUE}
        assert _train(ranks, run, layout) == {ExitCode.DONE}
        curves.append(curve(run))
    _same_curve(*curves)


def test_which_parameters_are_hidden_matrices() -> None:
    layer = "decoder.layers.0.mlp."
    assert is_hidden_matrix(layer + "router.weight", (4, 32)) and is_hidden_matrix(layer + "linear_fc1.weight", (8, 4))
    assert not is_hidden_matrix(layer + "linear_fc1.bias", (8,))
    assert not is_hidden_matrix("embedding.word_embeddings.weight", (304, 32))
    assert not is_hidden_matrix("output_layer.weight", (2, 32)), "an output layer, or a head with two labels"
