"""Overlapping communication with computation changes when things are computed, and nothing else.

Buckets are small enough that a model has several: only then does the gathering of one wait for the forward of another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, metrics, recipe, train_in_buckets, write_run

import megabatch.trainer

BUCKET = 3000
"""Numbers in a bucket; the embedding has 9,728, a layer a few thousand."""

OVERLAPS: dict[str, dict[str, bool]] = {
    "plain": {"use_distributed_optimizer": False},
    "plain_grad": {"use_distributed_optimizer": False, "overlap_grad_reduce": True},
    "distributed": {},
    "distributed_grad": {"overlap_grad_reduce": True},
    "distributed_both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
"""All that the rules between these settings allow."""

LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("qwen2", 2, {}),
    "ep2": ("qwen3_moe", 2, {"expert_model_parallel_size": 2}),
    "dp2_pp2_vpp2": ("qwen2", 4, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}
RESUMED = ("plain", "distributed", "distributed_both")
"""Each kind of optimizer, and all that overlaps; the others save the same bytes as these."""
STEPS, MORE = 2, 4


def _checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}"


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(
    request: pytest.FixtureRequest, ranks: RankServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run for each overlap, and runs that go on from some of their checkpoints without any."""
    model, world_size, parallel = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("overlaps")

    def write(name: str, settings: dict[str, bool], steps: int, **groups: dict[str, Any]) -> Path:
        made = recipe(
            folder,
            model,
            model={"num_layers": 4 if "vpp" in request.param else 2},
            parallel={**parallel, **settings},
            training={"train_iters": steps},
            learning_rate={"lr_decay_iters": MORE},
            # nothing else than saving may bring a checkpoint's parameters together: norms are logged one step later
            logging={"log_params_norm": True, "log_interval": STEPS + 1},
            evaluation={"eval_iters": 0},
            optimizer={"clip_grad": 0.0},  # the norm is summed shard by shard, whose last bit clipping would spread
            resources={"tasks_per_node": world_size},
            **groups,
        )
        return write_run(made, folder / name)

    save = {"save_interval": STEPS}
    found = {name: write(name, settings, STEPS + 1, checkpoint=save) for name, settings in OVERLAPS.items()}
    for name in RESUMED:
        load = {"load": str(_checkpoint(found[name]))}
        found[f"{name}, resumed"] = write(f"{name}-resumed", OVERLAPS["distributed"], MORE, checkpoint=load)
    for run in found.values():
        outcomes = ranks.run(train_in_buckets, world_size=world_size, run_dir=str(run), bucket_size=BUCKET)
        assert set(outcomes) == {0}
    return found


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_every_overlap_exports_the_same_bytes(overlap: str, runs: dict[str, Path]) -> None:
    expected = {
        path.name: path.read_bytes() for path in (_checkpoint(runs["distributed"]) / "hf").glob("*.safetensors")
    }
    assert expected
    found = {path.name: path.read_bytes() for path in (_checkpoint(runs[overlap]) / "hf").glob("*.safetensors")}
    assert found == expected


def digests(folders: list[str]) -> list[dict[str, str]]:
    """Names and digests of all tensors, whole, of each of these checkpoints."""
    from megatron.core import dist_checkpointing

    from megabatch.trainer.ranks import Ranks

    with Ranks():
        return [dict(_digests(dist_checkpointing.load_plain_tensors(folder))) for folder in folders]


def _digests(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _digests(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and not prefix.startswith("rng_state"):
            yield prefix + name, hashlib.blake2b(value.numpy().tobytes()).hexdigest()


def test_every_overlap_saves_the_same_state(ranks: RankServer, runs: dict[str, Path]) -> None:
    folders = [str(_checkpoint(runs[overlap]) / "mcore") for overlap in OVERLAPS]
    [found] = ranks.run(digests, world_size=1, folders=folders)
    expected = dict(zip(OVERLAPS, found, strict=True))["distributed"]
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in expected)
    for overlap, tensors in zip(OVERLAPS, found, strict=True):
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if tensors[name] != expected[name]] == [], overlap


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_every_overlap_sees_the_same_parameters(overlap: str, runs: dict[str, Path]) -> None:
    found, expected = (
        [(m["step"], m["loss"], m["params_norm"]) for m in metrics(runs[name]) if "params_norm" in m]
        for name in (overlap, "distributed")
    )
    assert found == expected
    assert [step for step, _, _ in expected] == [STEPS + 1]


@pytest.mark.parametrize("overlap", RESUMED)
def test_every_overlap_goes_on_without_it_as_if_it_had_not_been(overlap: str, runs: dict[str, Path]) -> None:
    assert len(curve(runs[f"{overlap}, resumed"])) == MORE - STEPS
    assert [m["step"] for m in metrics(runs[f"{overlap}, resumed"]) if "params_norm" in m] == [STEPS + 1, MORE]
    assert curve(runs[f"{overlap}, resumed"]) == curve(runs["distributed, resumed"])


def test_parameters_are_read_through_the_accessor_that_makes_them_current() -> None:
    """Only what runs the model, steps it or frees its gradients may hold megatron-core's wrappers."""
    room = Path(megabatch.trainer.__file__).parent
    users = {path.name for path in room.rglob("*.py") if re.search(r"\.wrapped\b", path.read_text(encoding="utf-8"))}
    assert users == {"build.py", "engine.py", "matrices.py", "optimizer.py", "replay.py", "stowage.py"}
