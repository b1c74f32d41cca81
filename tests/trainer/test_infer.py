"""Engine.infer: the readout's fields on every rank, the same at every layout, and nothing changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import recipe, write_run
from torch import Tensor

from megabatch.config.run import RunConfig
from megabatch.trainer.ops.vocab import token_logps
from megabatch.trainer.readouts.readout import Field, Readout

FIELDS = {"logps": Field("token"), "targets": Field("token", (2,), torch.int32), "sum": Field("sequence")}


@dataclass(frozen=True)
class Everything(Readout):
    """Floats and integers, of tokens and of sequences."""

    fields = FIELDS

    def __call__(self, output: Tensor, pack: Any, split: Any) -> Mapping[str, Tensor]:
        logps_T = token_logps(output, pack.targets_T, split.vocab)
        real_T = pack.targets_T > 0
        targets = torch.stack([pack.targets_T, -pack.targets_T], 1)
        return {"logps": logps_T, "targets": targets, "sum": pack.sequence_sums(logps_T * real_T)}


def inferred(run_dir: str) -> tuple[dict[int, Any], tuple[float, float], tuple[float, float]]:
    """Of each sample of the first step: log-probabilities, targets, sum. And (loss, gradient norm) of a step that
    comes after `infer`, and the loss and norm of the step after that one."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    found: dict[int, Any] = {}
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        taken = []
        for step in loop.parts.steps.after(progress.cursor, loop.engine):
            for pack, one in zip(step.packs, loop.engine.infer(step.packs, Everything()), strict=True):
                assert list(one) == list(FIELDS)
                for n in range(pack.sequences if not found.get(-1) else 0):
                    start, stop = pack.cu_seqlens_padded[n], pack.cu_seqlens_padded[n] + pack.cu_seqlens[n + 1]
                    part = slice(int(start), int(stop - pack.cu_seqlens[n]) - 1)
                    found[int(pack.columns["number"][n])] = (
                        one["logps"][part].tolist(), one["targets"][part].tolist(), float(one["sum"][n]))  # fmt: skip
            found[-1] = True
            result = loop.engine.step(step.packs, loop.parts.objective, totals=step.totals, filled=step.filled)
            taken.append((result.metrics["loss"].value, result.grad_norm))
            if len(taken) == 2:
                break
    del found[-1]
    return found, taken[0], taken[1]


LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("qwen2", 2, {}),
    "tp2_sp": ("qwen2", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("qwen2", 2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": ("qwen2", 2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "tp2_sp_pp2_vpp2": ("qwen2", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                                     "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "overlapped": ("qwen2", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "cp2": ("qwen2", 2, {"context_parallel_size": 2}),
    "cp2_pp2_vpp2": ("qwen2", 4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2,
                                  "num_virtual_stages_per_pipeline_rank": 2}),
    "ep2_pp2": ("qwen3_moe", 4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("infer")
    found = {"folder": folder}
    for model in ("qwen2", "qwen3_moe"):
        run = write_run(recipe(folder, model), folder / model)
        (found[model],) = ranks.run(inferred, world_size=1, run_dir=str(run))
    return found


def test_the_sum_over_a_sequence_is_that_of_its_tokens(alone: dict[str, Any]) -> None:
    for model in ("qwen2", "qwen3_moe"):
        samples, _, _ = alone[model]
        assert len(samples) == 8
        for logps, targets, total in samples.values():
            assert all(first == -second > 0 for first, second in targets)
            assert sum(logps) < 0
            assert total == pytest.approx(sum(logps), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_what_one_process_has(layout: str, ranks: RankServer, alone: dict[str, Any]) -> None:
    model, world_size, parallel = LAYOUTS[layout]
    groups: dict[str, Any] = {"parallel": parallel, "resources": {"tasks_per_node": world_size}}
    run = write_run(recipe(alone["folder"], model, **groups), alone["folder"] / layout)
    everyone = ranks.run(inferred, world_size=world_size, run_dir=str(run))
    expected, *steps = alone[model]
    seen: set[int] = set()
    for found, *its_steps in everyone:
        seen |= found.keys()
        for number, (logps, targets, total) in found.items():
            assert logps == pytest.approx(expected[number][0], rel=1e-5, abs=2e-6)
            assert targets == expected[number][1]
            assert total == pytest.approx(expected[number][2], rel=1e-5)
        for one, other in zip(its_steps, steps, strict=True):
            assert one == pytest.approx(other, rel=1e-5), "a step after it is as it would have been"
    assert seen == expected.keys()
