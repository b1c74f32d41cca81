"""LoRA trains alike at every layout: losses, gradient norms, and the adapter that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_runs import ALL, LORA, TP2, TP2_SP, adapter_of, run_of
from rank_server import RankServer
from runs import curve, evaluations, metrics, recipe, train, write_run

PP2 = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("qwen3", 2, {}),
    "dp2_plain": ("qwen3", 2, {"parallel": {"use_distributed_optimizer": False}}),
    "dp2_overlapped": ("qwen3", 2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "tp2": ("qwen3", 2, {"parallel": TP2}),
    "tp2_sp": ("qwen3", 2, {"parallel": TP2_SP}),
    "cp2": ("qwen3", 2, {"parallel": {"context_parallel_size": 2}}),
    "pp2_vpp2": ("qwen3", 2, {"parallel": {**PP2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "recompute": ("qwen3", 1, {"recompute": FULL}),
    "recompute_pp2": ("qwen3", 2, {"parallel": PP2, "recompute": FULL}),
    "experts_dp2": ("qwen3_moe", 2, {}),
    "experts_cp2_ep2": ("qwen3_moe", 2, {"parallel": {"context_parallel_size": 2, "expert_model_parallel_size": 2}}),
    "experts_tp2_sp": ("qwen3_moe", 2, {"parallel": TP2_SP}),
    "experts_ep2": ("qwen3_moe", 2, {"parallel": {"expert_model_parallel_size": 2}}),
    "experts_tp2_etp2": ("qwen3_moe", 2, {"parallel": {**TP2_SP, "expert_tensor_parallel_size": 2}}),
    "experts_tp2_etp2_plain": ("qwen3_moe", 2, {"parallel": {**TP2_SP, "expert_tensor_parallel_size": 2,
                                                             "use_distributed_optimizer": False}}),
    "experts_recompute": ("qwen3_moe", 1, {"recompute": {"recompute_modules": ["core_attn", "moe"]}}),
    "experts_tp2_ep2_pp2": ("qwen3_moe", 4, {"parallel": {**TP2_SP, **PP2, "expert_model_parallel_size": 2}}),
    "experts_dp2_etp2_tp2": ("qwen3_moe", 4, {"parallel": {**TP2_SP, "expert_tensor_parallel_size": 2}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    runs = {model: run_of(folder, model, model, 1, {}) for model in ("qwen3", "qwen3_moe")}
    for run in runs.values():
        assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, references: dict[str, Path]) -> None:
    model, world_size, groups = LAYOUTS[layout]
    run = run_of(references[model].parent, layout, model, world_size, groups)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    found, expected = curve(run), curve(references[model])
    assert len(found) == len(expected) == 4
    for (step, loss, norm), (_, its_loss, its_norm) in zip(found, expected, strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-5)), f"step {step}"
    norms, its_norms = ([line["params_norm"] for line in metrics(one)] for one in (run, references[model]))
    assert norms == pytest.approx(its_norms, rel=1e-6)
    for (_, loss), (_, its_loss) in zip(evaluations(run), evaluations(references[model]), strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-5)
    adapter, its_adapter = adapter_of(run), adapter_of(references[model])
    assert adapter.keys() == its_adapter.keys()
    assert all(tensor.shape == its_adapter[name].shape for name, tensor in adapter.items())


def test_what_dropout_left_out_is_left_out_again_where_layers_are_recomputed(
    ranks: RankServer, references: dict[str, Path]
) -> None:
    tuner = {**LORA, "target_modules": ALL, "lora_dropout": 0.2}
    curves = []
    for name, recompute in (("kept", {}), ("again", FULL), ("experts again", {"recompute_modules": ["moe"]})):
        groups = {"tuner": tuner, "recompute": recompute}
        run = write_run(
            recipe(references["qwen3_moe"].parent, "qwen3_moe", **groups), references["qwen3_moe"].parent / name
        )
        ranks.run(train, world_size=1, run_dir=str(run))
        curves.append(curve(run))
    for found in curves[1:]:
        for (_, loss, norm), (_, its_loss, its_norm) in zip(found, curves[0], strict=True):
            assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-5))
    assert abs(curves[0][-1][1] - curve(references["qwen3_moe"])[-1][1]) > 1e-5, "something is left out"


def test_adapters_learn(references: dict[str, Path]) -> None:
    for run in references.values():
        losses = [loss for _, loss in evaluations(run)]
        assert losses[-1] < losses[0] - 0.02
