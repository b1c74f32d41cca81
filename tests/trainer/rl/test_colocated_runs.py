"""Whole GRPO runs that generate with a real vLLM inside their ranks: what they log, and an exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rank_server import RankServer
from runs import MODELS, curve, metrics, train, write_run
from test_grpo_runs import grpo_recipe
from vllm_python import NEEDS_VLLM

from megabatch import Rollout
from megabatch.ledger.reader import Reader

pytestmark = NEEDS_VLLM
VLLM = Rollout(
    temperature=1.0,
    max_completion_length=8,
    vllm_mode="colocate",
    vllm_enforce_eager=True,
    vllm_max_num_seqs=16,
    vllm_engine_kwargs={"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256},
    sleep_level=1,
)


def colocated(folder: Path) -> Any:
    """With tied embeddings."""
    made = grpo_recipe(
        folder,
        world_size=2,
        grpo={"steps_per_generation": 1},
        model={**MODELS["qwen3"], "kv_channels": 32},
        training={"train_iters": 3},
        evaluation={"eval_on_start": False, "eval_interval": 100},
    )
    return replace(made, rollout=VLLM)


def test_a_run_resumes_bit_for_bit(ranks_with_vllm: RankServer, tmp_path: Path) -> None:
    """Also one whose trainer moves to host memory while vLLM generates."""
    made = colocated(tmp_path)
    whole = write_run(made, tmp_path / "whole")
    moves = replace(made.rollout, offload_model=True, offload_optimizer=True)
    cut = write_run(replace(made, rollout=moves), tmp_path / "cut")
    run = ranks_with_vllm.run
    assert run(train, world_size=2, run_dir=str(whole)) == [0, 0]
    assert run(train, world_size=2, run_dir=str(cut), stop_after=1) == [75, 75]
    assert run(train, world_size=2, run_dir=str(cut)) == [0, 0]
    assert curve(cut) == curve(whole)
    for one, other in zip(metrics(cut), metrics(whole), strict=True):
        assert 0 < one["sync_max_logp_difference"] == other["sync_max_logp_difference"] < 1e-4
        assert one["staleness"] == 0 and one["reward"] == other["reward"]
    for step in (1, 2, 3):
        found, expected = (list(Reader(folder / "ledger").records(step)) for folder in (cut, whole))
        assert [(one.key, one.ids, one.logps) for one in found] == [(one.key, one.ids, one.logps) for one in expected]
        assert {version for one in found for version in one.versions} == {step - 1}
