"""The trainer in host memory between its steps: what is freed, what comes back, and that training goes on as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, recipe, train, write_run
from torch import Tensor

LORA = {"tuner_type": "lora", "lora_rank": 4, "target_modules": ["all-linear"]}
WORLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts_bf16": (
        "qwen3_moe",
        {
            "model": {"torch_dtype": "bfloat16"},
            "parallel": {"expert_model_parallel_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        },
    ),
    "tied_stages": (
        "qwen2",
        {"parallel": {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": False}},
    ),
    "lora": ("qwen3", {"tuner": LORA}),
}


def stowed(run_dir: str) -> list[dict[str, Any]]:
    """Trains; before each step everything leaves and comes back. Returns: what was seen of it."""
    from megabatch.trainer.engine import Engine
    from megabatch.trainer.stowage import Stowage

    step, seen = Engine.step, []

    def stowing(self: Any, *arguments: Any, **keywords: Any) -> Any:
        self._stowage = Stowage(
            self.model, self.optimizer, device=self.ranks.device, moves_model=True, moves_optimizer=True
        )
        assert self.model.chunks
        kept, gradients = list(_kept(self)), list(_gradients(self))
        before = [one.clone() for one in kept]
        shared = _shared([*kept, *gradients])
        self.leave_device()
        self.leave_device()
        away = sum(one.untyped_storage().nbytes() for one in [*kept, *gradients])
        self.return_to_device()
        is_same = all(torch.equal(one, other) for one, other in zip(kept, before, strict=True))
        zeroed = not any(one.any() for one in gradients)
        seen.append({
            "away": away, "is_same": is_same, "zeroed": zeroed, "shares": _shared([*kept, *gradients]) == shared,
            "states": len(list(self.optimizer.tensors())),
        })  # fmt: skip
        return step(self, *arguments, **keywords)

    Engine.step = stowing  # type: ignore[method-assign]
    assert train(run_dir) == 0
    return seen


def _kept(engine: Any) -> Iterator[Tensor]:
    for chunk in engine.model.wrapped:
        yield from chunk.parameters()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield from [] if buffer.param_data is None else [buffer.param_data]
    yield from engine.optimizer.tensors()


def _gradients(engine: Any) -> Iterator[Tensor]:
    for chunk in engine.model.wrapped:
        for parameter in chunk.parameters():
            yield from [parameter.main_grad] if parameter.requires_grad else []
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield from (bucket.grad_data for bucket in buffer.buckets)


def _shared(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """For each tensor the first that has the same storage, and its place in there."""
    first: dict[int, int] = {}
    return [
        (first.setdefault(one.untyped_storage().data_ptr(), number), one.storage_offset())
        for number, one in enumerate(tensors)
    ]


@pytest.mark.parametrize("world", WORLDS)
def test_training_goes_on_as_if_nothing_had_left(world: str, ranks: RankServer, tmp_path: Path) -> None:
    model, groups = WORLDS[world]
    made = recipe(
        tmp_path, model, **groups, resources={"tasks_per_node": 2}, training={"train_iters": 3},
        evaluation={"eval_iters": 0, "eval_on_start": False}, batch={"micro_batch_size": 1, "global_batch_size": 4},
    )  # fmt: skip
    plain, moved = (write_run(made, tmp_path / name) for name in ("plain", "moved"))
    assert ranks.run(train, world_size=2, run_dir=str(plain)) == [0, 0]
    for seen in ranks.run(stowed, world_size=2, run_dir=str(moved)):
        assert [one["away"] for one in seen] == [0, 0, 0]
        assert all(one["is_same"] and one["zeroed"] and one["shares"] for one in seen)
        assert seen[0]["states"] < seen[1]["states"] == seen[2]["states"], "state that is made by the first step too"
    assert curve(moved) == curve(plain)
    files = [sorted(run.glob("checkpoints/*/hf/*.safetensors")) for run in (moved, plain)]
    assert files[0] and [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
