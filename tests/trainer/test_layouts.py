"""The same batches give the same losses, gradient norms and evaluations with every setting of a layout; its sizes are
combined in test_compositions.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, with_fields, write_run

CP: dict[str, Any] = {"context_parallel_size": 2}

DENSE: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"parallel": {"use_distributed_optimizer": False}}),
    "dp2_overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "micro4": (1, {"batch": {"micro_batch_size": 4}}),
    "tp2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "tp2_sp": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "pp2_vpp2": (2, {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "pp2_uneven": (2, {"parallel": {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 3}}),
    "pp2_layout": (2, {"parallel": {"pipeline_model_parallel_size": 2,
                                    "pipeline_model_parallel_layout": "Et|ttt|,|L"}}),
    "tp2_sp_pp2": (4, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                                    "pipeline_model_parallel_size": 2}}),
    "dp2_pp2": (4, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "recompute_full": (1, {"recompute": {"recompute_granularity": "full", "recompute_method": "uniform",
                                         "recompute_num_layers": 2}}),
    "recompute_none": (1, {"recompute": {"recompute_granularity": "none"}}),
    "recompute_block_pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2},
                                "recompute": {"recompute_granularity": "full", "recompute_method": "block",
                                              "recompute_num_layers": 1}}),
    "padded": (1, {"data": {"pad_to_max_length": True}, "batch": {"micro_batch_size": 4}}),
    "not_padding_free": (1, {"data": {"padding_free": False}, "batch": {"micro_batch_size": 4}}),
    "cp2_not_padding_free": (2, {"data": {"padding_free": False}, "batch": {"micro_batch_size": 4}, "parallel": CP}),
    "padded_tp2_sp": (2, {"data": {"pad_to_max_length": True},
                          "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "padded_pp2": (2, {"data": {"pad_to_max_length": True}, "parallel": {"pipeline_model_parallel_size": 2}}),
    "padded_pp2_vpp2": (2, {"data": {"pad_to_max_length": True},
                            "parallel": {"pipeline_model_parallel_size": 2,
                                         "num_virtual_stages_per_pipeline_rank": 2}}),
    "fused_cross_entropy": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
                                "kernels": {"cross_entropy_loss_fusion": True}}),
    "cp2": (2, {"parallel": CP}),
    "cp2_recompute_full": (2, {"parallel": CP, "recompute": {"recompute_granularity": "full",
                                                             "recompute_method": "uniform",
                                                             "recompute_num_layers": 2}}),
    "cp2_recompute_none": (2, {"parallel": CP, "recompute": {"recompute_granularity": "none"}}),
    "cp2_micro4": (2, {"parallel": CP, "batch": {"micro_batch_size": 4}}),
    "cp2_pp2_vpp2": (4, {"parallel": {**CP, "pipeline_model_parallel_size": 2,
                                      "num_virtual_stages_per_pipeline_rank": 2}}),
    "cp2_dp2": (4, {"parallel": {**CP, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "cp2_padded_pp2": (4, {"parallel": {**CP, "pipeline_model_parallel_size": 2},
                           "data": {"pad_to_max_length": True}}),
}  # fmt: skip

EXPERTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dp2": DENSE["dp2"],
    "micro4": DENSE["micro4"],
    # replicas of the experts on tensor-parallel ranks: their gradients must be added up
    "tp2_sp": DENSE["tp2_sp"],
    "pp2_vpp2": DENSE["pp2_vpp2"],
    "ep2": (2, {"parallel": {"expert_model_parallel_size": 2}}),
    "padded_ep2": (2, {"data": {"pad_to_max_length": True}, "parallel": {"expert_model_parallel_size": 2}}),
    "not_padding_free": DENSE["not_padding_free"],
    "tp2_ep2_dp2": (4, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                                     "expert_model_parallel_size": 2}}),
    "pp2_ep2": (4, {"parallel": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}}),
    "cp2_ep2": (2, {"parallel": {**CP, "expert_model_parallel_size": 2}}),
    "cp2_tp2_etp2_ep2": (4, {"parallel": {**CP, "tensor_model_parallel_size": 2, "sequence_parallel": True,
                                          "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2}}),
    "recompute_moe": (1, {"recompute": {"recompute_modules": ["core_attn", "moe"]}}),
}  # fmt: skip

CASES = [
    *[("qwen2", layout) for layout in DENSE],
    *[(model, layout) for model in ("llama", "qwen3") for layout in ("micro4", "tp2", "tp2_sp_pp2")],
    *[("qwen3_moe", layout) for layout in EXPERTS],
]


DEEP = {"num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "pipeline_model_parallel_layout"}


def layers_of(layout: str) -> int:
    """Four where layers are shared out in parts, else as many as two stages need."""
    groups = {**DENSE, **EXPERTS}[layout][1]
    return 4 if "recompute" in groups or DEEP & groups.get("parallel", {}).keys() else 2


def made(folder: Path, name: str, model: str, layers: int, groups: dict[str, dict[str, Any]]) -> Path:
    sized: dict[str, Any] = {"model": {"num_layers": layers}, "evaluation": {"eval_interval": 4}}
    return write_run(recipe(folder, model, **sized, **groups), folder / name)


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """One process for each model and number of layers, one sample a micro-batch."""
    folder = tmp_path_factory.mktemp("layouts")
    runs = {}
    for model, layers in sorted({(model, layers_of(layout)) for model, layout in CASES}):
        runs[model, layers] = made(folder, f"{model}-{layers}", model, layers, {})
        assert ranks.run(train, world_size=1, run_dir=str(runs[model, layers])) == [0]
    return runs


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_losses_and_gradients_do_not_depend_on_the_layout(
    model: str, layout: str, ranks: RankServer, references: dict[tuple[str, int], Path]
) -> None:
    world_size, groups = {**DENSE, **EXPERTS}[layout]
    reference = references[model, layers_of(layout)]
    groups = {**groups, "resources": {"tasks_per_node": world_size}}
    run = made(reference.parent, f"{model}-{layout}", model, layers_of(layout), groups)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    found, expected = curve(run), curve(reference)
    assert len(found) == len(expected) == 4
    for (step, loss, norm), (_, reference_loss, reference_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(reference_loss, rel=1e-5), f"step {step}"
        assert norm == pytest.approx(reference_norm, rel=1e-5), f"step {step}"
    for (_, loss), (_, reference_loss) in zip(evaluations(run), evaluations(reference), strict=True):
        assert loss == pytest.approx(reference_loss, rel=1e-5)


def test_training_learns(references: dict[tuple[str, int], Path]) -> None:
    for run in references.values():
        losses = [loss for _, loss in evaluations(run)]
        assert losses[-1] < losses[0] - 0.1


PACKED: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "alone": (1, {}),
    "tp2_sp": DENSE["tp2_sp"],
    "cp2": DENSE["cp2"],
    "cp2_padded_pp2": DENSE["cp2_padded_pp2"],
}


def test_packing_changes_the_batch_and_not_the_mathematics(ranks: RankServer, tmp_path: Path) -> None:
    """A packed row is a micro-batch of its sequences: the same rows at another layout give the same losses."""
    curves = {}
    for layout, (world_size, groups) in PACKED.items():
        small = {"model": {"num_layers": 2}, "batch": {"micro_batch_size": 1, "global_batch_size": 2}}
        one = recipe(tmp_path, "qwen3", **groups, **small, evaluation={"eval_interval": 4})
        packed = {"packing": True, "packing_length": 192}
        one = with_fields(one, data=packed, resources={"tasks_per_node": world_size})
        run = write_run(one, tmp_path / f"packed-{layout}")
        ranks.run(train, world_size=world_size, run_dir=str(run))
        curves[layout] = [number for _, *numbers in curve(run) for number in numbers]
    for layout in PACKED:
        assert curves[layout] == pytest.approx(curves["alone"], rel=1e-5), layout
