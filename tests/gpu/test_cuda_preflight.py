"""The preflight's GPU half on a real GPU and its driver's real nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import torch

from megabatch.trainer.preflight import node, speed


def test_nvidia_smi_is_understood(tmp_path: Path) -> None:
    """Throttling and other programs' memory are this machine's own affair; its GPUs are counted and answer."""
    found = node.faults(gpus=torch.cuda.device_count(), local_cache=tmp_path, ranks=0)
    assert [bad for bad in found if bad.check == "gpus"] == []
    more = node.faults(gpus=torch.cuda.device_count() + 1, local_cache=tmp_path, ranks=0)
    assert "gpus" in {bad.check for bad in more}


def test_every_gpu_multiplies_exactly() -> None:
    found = speed.matmul(gpus=torch.cuda.device_count())
    assert len(found) == torch.cuda.device_count()
    assert all(device.get("tflops", 0) > 1 for device in found), found
