"""DeepEP's dispatch between GPUs: losses are those of alltoall, on rows with padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cuda_run, require_gpus, train_on
from rank_server import ONE_GPU, RankServer
from runs import curve

pytest.importorskip("deep_ep", reason="the dispatcher is DeepEP's")

GROUPS: dict[str, Any] = {
    "model": {"torch_dtype": "bfloat16", "hidden_size": 256, "kv_channels": 32},
    "data": {"pad_to_max_length": True},
}
SPLIT: dict[str, Any] = {
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": 2,
    },
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", SPLIT)
def test_losses_are_those_of_alltoall(
    layout: str, recompute: dict[str, Any], gpus: RankServer, tmp_path: Path
) -> None:
    """Each of these runs also makes the proof of `trainer.dispatch_proof`."""
    require_gpus(2)
    if ONE_GPU:
        pytest.skip("DeepEP needs a GPU for each rank")
    curves = []
    for dispatcher in ("alltoall", "flex"):
        run = cuda_run(
            tmp_path,
            dispatcher,
            "qwen3_moe",
            world_size=2,
            **GROUPS,
            parallel=SPLIT[layout],
            moe={"moe_token_dispatcher_type": dispatcher},
            recompute=recompute,
        )
        train_on(gpus, run, world_size=2)
        curves.append(curve(run))
    for (step, loss, norm), (_, its_loss, its_norm) in zip(*reversed(curves), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-2), pytest.approx(its_norm, rel=1e-1)), f"step {step}"
