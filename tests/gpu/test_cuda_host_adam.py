"""Adam in host memory beside a GPU: torch's updates bit for bit, memory that leaves the device, runs that resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_runs import cuda_run, require_gpus, train_on
from rank_server import RankServer
from runs import curve

from megabatch.trainer.host_adam import HostAdam

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(1024, 1024), (333,), (4096, 512), (1 << 22,)]
GROUPS: dict[str, Any] = {
    "model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32},
    "training": {"train_iters": 6, "deterministic_mode": True},
    "checkpoint": {"save_interval": 3},
}


def parameters(*, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("overlaps", [False, True], ids=["in-order", "overlapped"])
@pytest.mark.parametrize("pins", [False, True], ids=["pageable", "pinned"])
def test_the_hosts_part_is_torchs_adamw_on_the_cpu(overlaps: bool, pins: bool) -> None:
    """The device works between updates, and reads each new value: a copy too early or too late would show."""
    expected = [one.float().requires_grad_() for one in parameters(seed=0, dtype=torch.bfloat16)]
    reference = torch.optim.AdamW([{"params": expected, **SETTINGS}], fused=True)
    found: list[Any] = [one.cuda() for one in parameters(seed=0, dtype=torch.bfloat16)]
    ours = HostAdam([{"params": found, **SETTINGS}], fraction=1.0, overlaps=overlaps, pins=pins)
    buffers = [torch.empty(one.shape, dtype=torch.float32, device="cuda") for one in found]
    busy = torch.randn(4096, 4096, device="cuda")
    for step in range(10):
        busy = (busy @ busy).div_(busy.norm())  # keeps the device behind the host
        for mine, main, buffer, made in zip(
            found, expected, buffers, parameters(seed=step + 1, dtype=torch.float32), strict=True
        ):
            # gradients depend on the values, as in training
            buffer.copy_(made.cuda() + mine.float())
            mine.decoupled_grad = buffer
            main.grad = made + main.detach().bfloat16().float()
        ours.step()
        reference.step()
    for mine, main in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), main.detach().bfloat16())
        assert ours.state[mine]["master_param"].device.type == "cpu"
        assert torch.equal(ours.state[mine]["master_param"], main.detach())
    assert list(ours.apart(by_rounding=False)) == []


def test_the_rest_is_torchs_adamw_on_the_device() -> None:
    expected = [one.float().cuda().requires_grad_() for one in parameters(seed=0, dtype=torch.bfloat16)]
    reference = torch.optim.AdamW([{"params": expected, **SETTINGS}], fused=True)
    found: list[Any] = [one.cuda() for one in parameters(seed=0, dtype=torch.bfloat16)]
    ours = HostAdam([{"params": found, **SETTINGS}], fraction=0.1)
    assert [ours.on_host(one) for one in found] == [True, False, False, False]
    for step in range(5):
        for mine, main, made in zip(found, expected, parameters(seed=step + 1, dtype=torch.float32), strict=True):
            mine.decoupled_grad = main.grad = made.cuda()
        ours.step()
        reference.step()
    for mine, main in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours.state[mine]["master_param"], main.detach())
        assert torch.equal(mine, main.detach().bfloat16())


def test_state_leaves_the_device() -> None:
    found: list[Any] = [one.cuda() for one in parameters(seed=0, dtype=torch.bfloat16)]
    for one in found:
        one.decoupled_grad = torch.zeros_like(one, dtype=torch.float32)
    before, elements = torch.cuda.memory_allocated(), sum(one.numel() for one in found)
    host = HostAdam([{"params": found, **SETTINGS}], fraction=1.0)
    host.step()
    assert torch.cuda.memory_allocated() == before
    device = HostAdam([{"params": found, **SETTINGS}], fraction=0.0)
    device.step()
    assert torch.cuda.memory_allocated() - before >= 12 * elements


@pytest.mark.parametrize(
    ("model", "optimizer", "world_size"),
    [
        ("qwen2", {"overlap_cpu_optimizer_d2h_h2d": True}, 1),
        ("qwen2", {"optimizer_offload_fraction": 0.5}, 1),
        ("qwen3_moe", {"optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}, 1),
        ("qwen3", {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16"}, 1),
        ("qwen2", {"optimizer_offload_fraction": 0.5}, 2),
    ],
    ids=["whole", "half", "experts", "bf16-gradients", "two-ranks"],
)
def test_a_run_trains_as_without_and_resumes_bit_for_bit(
    model: str, optimizer: dict[str, Any], world_size: int, gpus: RankServer, tmp_path: Path
) -> None:
    require_gpus(world_size)
    plain = cuda_run(tmp_path, "plain", model, world_size=world_size, **GROUPS)
    offload = {"optimizer_cpu_offload": True, **optimizer}
    run = cuda_run(tmp_path, "run", model, world_size=world_size, **GROUPS, optimizer=offload)
    train_on(gpus, plain, world_size=world_size)
    train_on(gpus, run, world_size=world_size)
    whole, near = curve(run), 1e-2 if "main_grads_dtype" in optimizer else 1e-3
    for (step, loss, norm), (_, its_loss, its_norm) in zip(whole, curve(plain), strict=True):
        expected = (pytest.approx(its_loss, rel=near), pytest.approx(its_norm, rel=10 * near))
        assert (loss, norm) == expected, f"step {step}"
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "metrics.jsonl").unlink()
    train_on(gpus, run, world_size=world_size)
    assert curve(run) == whole[3:]
