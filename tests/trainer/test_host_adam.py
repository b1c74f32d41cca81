"""Adam in host memory: torch's updates bit for bit, over whole runs, layouts and resumes; a wrong copy is an error.

Host and device are the same memory here. tests/gpu/test_cuda_host_adam.py has two.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, recipe, train, write_run

from megabatch.run_directory import ExitCode
from megabatch.trainer.host_adam import HostAdam

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 5), (3,), (64,), (2, 2, 2)]


def parameters(dtype: torch.dtype, *, seed: int = 0) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_updates_are_those_of_torchs_adamw(fraction: float) -> None:
    expected = [one.float().requires_grad_() for one in parameters(torch.bfloat16)]
    reference = torch.optim.AdamW([{"params": expected, **SETTINGS}], fused=True)
    found: list[Any] = parameters(torch.bfloat16)
    ours = HostAdam([{"params": found, **SETTINGS}], fraction=fraction)
    for step in range(5):
        for mine, main, gradient in zip(found, expected, parameters(torch.float32, seed=step + 1), strict=True):
            mine.decoupled_grad, main.grad = gradient.clone(), gradient.clone()
        ours.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        reference.step()
        ours.step()
        for mine, main in zip(found, expected, strict=True):
            state = reference.state[main]
            assert torch.equal(ours.state[mine]["master_param"], main)
            assert torch.equal(ours.state[mine]["exp_avg"], state["exp_avg"])
            assert torch.equal(ours.state[mine]["exp_avg_sq"], state["exp_avg_sq"])
            assert torch.equal(mine, main.bfloat16())
    assert list(ours.apart(by_rounding=False)) == []


@pytest.mark.parametrize(
    ("fraction", "elements"), [(0.0, 0), (0.1, 35), (35 / 110, 35), (0.33, 38), (0.5, 102), (1.0, 110)]
)
def test_the_first_parameters_are_on_the_host_until_the_fraction_is_reached(fraction: float, elements: int) -> None:
    assert HostAdam([{"params": parameters(torch.float32)}], fraction=fraction).host_elements == elements


def test_gradients_in_bfloat16_are_read_as_fp32() -> None:
    ours, exact = (parameters(torch.bfloat16) for _ in range(2))
    for made, dtype in ((ours, torch.bfloat16), (exact, torch.float32)):
        for one, gradient in zip(made, parameters(torch.bfloat16, seed=1), strict=True):
            one.decoupled_grad = gradient.to(dtype)  # type: ignore[attr-defined]
        HostAdam([{"params": made, **SETTINGS}], fraction=1.0).step()
    assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))


def test_a_main_copy_that_is_not_the_parameters_is_found() -> None:
    found: list[Any] = parameters(torch.bfloat16)
    ours = HostAdam([{"params": found, **SETTINGS}], fraction=0.33)
    for one in found:
        ours.initialize_state(one)
    assert list(ours.apart(by_rounding=False)) == []
    found[1].add_(1.0)
    found[2].add_(1.0)  # on the device, where there is no copy to go wrong
    assert [one is found[1] for one in ours.apart(by_rounding=True)] == [True]
    ours.take_values()
    assert list(ours.apart(by_rounding=False)) == []
    ours.state[found[0]]["master_param"].mul_(1 + 2**-7)
    assert list(ours.apart(by_rounding=True)) == []
    assert [one is found[0] for one in ours.apart(by_rounding=False)] == [True]


CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "fp32": ("qwen2", 0.5, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "bf16": ("qwen3", 1.0, {"model": {"torch_dtype": "bfloat16"}}),
    "fp16": ("qwen3", 0.5, {"model": {"torch_dtype": "float16"}, "precision": {"initial_loss_scale": 2.0**12}}),
    "experts": (
        "qwen3_moe", 0.5, {"model": {"torch_dtype": "bfloat16"}, "parallel": {"expert_model_parallel_size": 2}}
    ),
    "lora": ("qwen3", 0.5, {"tuner": {"tuner_type": "lora", "target_modules": ("all-linear",)}}),
}  # fmt: skip


def run_of(folder: Path, name: str, model: str, groups: dict[str, Any], **optimizer: Any) -> Path:
    made = {"resources": {"tasks_per_node": 2}, "checkpoint": {"save_interval": 2}, **groups}
    made["model"] = {"num_layers": 2, **groups.get("model", {})}
    made["evaluation"] = {"eval_iters": 0}  # curves alone are compared
    made["optimizer"] = {"clip_grad": 0.1, "adam_eps": 0.01, **optimizer}
    return write_run(recipe(folder, model, **made), folder / name)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_without_and_resumes_bit_for_bit(case: str, ranks: RankServer, tmp_path: Path) -> None:
    model, fraction, groups = CASES[case]
    plain = run_of(tmp_path, "plain", model, groups)
    assert ranks.run(train, world_size=2, run_dir=str(plain)) == [ExitCode.DONE] * 2
    expected = curve(plain)
    assert len({loss for _, loss, _ in expected}) == len(expected) == 4
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    run = run_of(tmp_path, "run", model, groups, **offload)
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    assert curve(run) == expected
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "metrics.jsonl").unlink()
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    assert curve(run) == expected[2:]


def test_a_checkpoint_loads_with_and_without(ranks: RankServer, tmp_path: Path) -> None:
    """Its main weights are fp32, whose bits bfloat16 weights alone would not bring back."""
    half: dict[str, Any] = {"model": {"torch_dtype": "bfloat16"}}
    plain = run_of(tmp_path, "plain", "qwen3", half)
    assert ranks.run(train, world_size=2, run_dir=str(plain)) == [ExitCode.DONE] * 2
    shutil.copytree(plain, saved := tmp_path / "saved")
    shutil.rmtree(saved / "checkpoints" / "step_00000004")
    run = run_of(tmp_path, "run", "qwen3", half, optimizer_cpu_offload=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    shutil.copytree(saved / "checkpoints", run / "checkpoints")
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    assert curve(run) == curve(plain)[2:]
    shutil.rmtree(plain / "checkpoints" / "step_00000004")
    shutil.rmtree(plain / "checkpoints" / "step_00000002")
    shutil.copytree(run / "checkpoints" / "step_00000002", plain / "checkpoints" / "step_00000002")
    before = curve(plain)
    (plain / "metrics.jsonl").unlink()
    assert ranks.run(train, world_size=2, run_dir=str(plain)) == [ExitCode.DONE] * 2
    assert curve(plain) == before[2:]


@pytest.mark.parametrize(("saved", "loaded"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_a_checkpoint_of_another_type_goes_on_as_without(
    saved: str, loaded: str, ranks: RankServer, tmp_path: Path
) -> None:
    """The model's weights are rounded to both types, main weights to none."""
    groups: dict[str, Any] = {"model": {"torch_dtype": saved}, "precision": {"initial_loss_scale": 2.0**12}}
    first = run_of(tmp_path, "first", "qwen3", groups)
    assert ranks.run(train, world_size=2, run_dir=str(first)) == [ExitCode.DONE] * 2
    shutil.rmtree(first / "checkpoints" / "step_00000004")
    groups |= {"model": {"torch_dtype": loaded}, "checkpoint": {"load": str(first)}}
    runs = [run_of(tmp_path, str(on), "qwen3", groups, optimizer_cpu_offload=on) for on in (False, True)]
    for run in runs:
        assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    assert curve(runs[0]) == curve(runs[1]) and [step for step, *_ in curve(runs[0])] == [3, 4]


def test_gradients_in_bfloat16_train_near_and_resume_bit_for_bit(ranks: RankServer, tmp_path: Path) -> None:
    half: dict[str, Any] = {"model": {"torch_dtype": "bfloat16"}}
    plain = run_of(tmp_path, "plain", "qwen3", half)
    assert ranks.run(train, world_size=2, run_dir=str(plain)) == [ExitCode.DONE] * 2
    reduced = {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16", "optimizer_offload_fraction": 0.5}
    run = run_of(tmp_path, "run", "qwen3", half, optimizer_cpu_offload=True, **reduced)
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    whole = curve(run)
    for (_, loss, _), (_, its_loss, _) in zip(whole, curve(plain), strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-2)
    assert whole != curve(plain), "otherwise nothing was reduced"
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "metrics.jsonl").unlink()
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [ExitCode.DONE] * 2
    assert curve(run) == whole[2:]


def train_with_lost_values(run_dir: str) -> int:
    """Trains where a new value of one parameter never comes back from the host."""
    step = HostAdam.step

    def lossy(self: HostAdam) -> None:
        parameter = next(iter(self._host))
        before = parameter.clone()
        step(self)
        parameter.copy_(before)

    HostAdam.step = lossy  # type: ignore[method-assign]
    try:
        return train(run_dir)
    finally:
        HostAdam.step = step  # type: ignore[method-assign]


def test_a_value_that_does_not_come_back_ends_the_run(ranks: RankServer, tmp_path: Path) -> None:
    half = {"model": {"torch_dtype": "bfloat16"}, "resources": {"tasks_per_node": 1}}
    run = run_of(tmp_path, "run", "qwen3", half, optimizer_cpu_offload=True)
    with pytest.raises(RuntimeError, match=r"are not the model's weights, in output_layer.weight \(1 of this rank"):
        ranks.run(train_with_lost_values, world_size=1, run_dir=str(run))
    assert not list((run / "checkpoints").glob("step_*"))
