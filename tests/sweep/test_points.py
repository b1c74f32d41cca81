"""Expanding a sweep, and every fault of its declaration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megabatch import Sweep
from megabatch.cli.recipe_file import load_recipe
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.sweep.points import Point, points_of

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.py")


def _points(*given: str, recipe: Recipe | None = None, **sweep: Any) -> list[Point]:
    return points_of(Sweep(RECIPE, **sweep), recipe or RECIPE(), given=given)


def _faults(*given: str, **sweep: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _points(*given, **sweep)
    return [str(fault) for fault in caught.value.faults]


def test_grid_zip_and_list_multiply() -> None:
    points = _points(
        zip={"lr": [1e-3, 1e-4], "min_lr": [1e-4, 1e-5]},
        grid={"seed": [1, 2], "micro_batch_size": (2,)},
        list=[{}, {"weight_decay": 0.0, "adam_eps": 1e-6}],
    )
    assert [point.name for point in points[:4]] == [
        "mbs2-lr0.001-min_lr1e-4-seed1",
        "mbs2-lr0.001-wd0-min_lr1e-4-adam_eps1e-6-seed1",
        "mbs2-lr0.001-min_lr1e-4-seed2",
        "mbs2-lr0.001-wd0-min_lr1e-4-adam_eps1e-6-seed2",
    ]
    assert len({point.name for point in points}) == 8
    last = points[-1].recipe
    assert (last.learning_rate.lr, last.learning_rate.min_lr, last.training.seed) == (1e-4, 1e-5, 2)
    assert last.optimizer.weight_decay == 0.0 and points[-2].recipe.optimizer.weight_decay == 0.1


def test_each_point_is_a_recipe_with_a_name_of_its_own() -> None:
    (point,) = _points(grid={"seed": [7]})
    assert point.recipe.name == "quickstart-seed7" and point.values == {"training.seed": 7}
    assert point.recipe.checkpoint.save == "megatron_output/quickstart"


def test_any_parameter_under_any_of_its_names() -> None:
    points = _points(grid={"parallel.expert_model_parallel_size": [1], "rope_fusion": [True, False]})
    assert [point.recipe.kernels.no_rope_fusion for point in points] == [False, True]
    (point,) = _points(grid={"dataset": [["a.jsonl", "b c.jsonl"]]})
    assert point.recipe.data.dataset == ("a.jsonl", "b c.jsonl")


def test_values_on_the_command_line_are_read_as_flags_are() -> None:
    points = _points("lr=1e-3, 2e-3", "sequence_parallel=false", 'dataset=["a,b.jsonl",["c","d"]]')
    assert [(p.recipe.learning_rate.lr, p.recipe.data.dataset) for p in points] == [
        (lr, dataset) for lr in (1e-3, 2e-3) for dataset in (("a,b.jsonl",), ("c", "d"))
    ]


def test_the_command_line_replaces_a_grids_values_and_adds_to_them() -> None:
    points = _points("seed=5", "lr=1e-3", grid={"seed": [1, 2], "micro_batch_size": [1, 2]})
    assert [point.name for point in points] == ["mbs1-lr0.001-seed5", "mbs2-lr0.001-seed5"]


def test_every_fault_is_reported_with_its_fix() -> None:
    assert _faults(
        grid={"lrr": [1], "lr": ["fast", 1e-3], "micro_batch_size": [0], "global_batch_size": [], "seed": 3},
        list=[{"num_layer": 2}],
    ) == [
        "sweep.grid['lrr'] is not a parameter; try lr",
        "sweep.grid['lr']='fast' must be a number or None, not str",
        "sweep.grid['micro_batch_size']=0 must be at least 1",
        "sweep.grid['global_batch_size']=[] is empty; give at least one value",
        "sweep.grid['seed']=3 must be a list of values",
        "sweep.list['num_layer'] is not a parameter; try num_layers or num_labels",
    ]


def test_faults_of_the_command_line() -> None:
    assert _faults("lr", "seed=", "tensor_parallel=1", "lr=1,fast", "micro_batch_size=0") == [
        "--sweep lr needs values; try --sweep lr=1,2",
        "--sweep seed='' is empty; give at least one value",
        "--sweep tensor_parallel is not a parameter; try tensor_model_parallel_size or expert_tensor_parallel_size",
        "--sweep lr='1,fast' must be a number or None; separate values by commas, or give a JSON array",
        "--sweep micro_batch_size=0 must be at least 1",
    ]


def test_what_is_of_the_whole_sweep_cannot_be_swept() -> None:
    names = ("name", "run_dir", "save", "checkpoint.save", "submit")
    said = [f"--sweep {name} cannot be swept: it is of the whole sweep" for name in names]
    assert _faults(*(f"{name}=a,b" for name in names)) == said


def test_a_sweep_of_too_many_runs_is_refused_before_it_is_made() -> None:
    many = {"seed": range(10**4), "train_iters": range(100, 200)}
    assert _faults(grid=many) == ["sweep asks for 1,000,000 runs; it may have 10,000"]
    half = {
        "grid": {"seed": range(200)},
        "zip": {"lr": [0.1, 0.2]},
        "list": [{"log_interval": n} for n in range(1, 27)],
    }
    assert _faults(**half) == ["sweep asks for 10,400 runs; it may have 10,000"]
    assert _faults(grid={"seed": range(10**12)})[0].endswith("values; a sweep may have 10,000 runs")


def test_lengths_of_zip_and_a_parameter_in_two_places() -> None:
    first, second = _faults(zip={"lr": [1e-3], "seed": [1, 2]}, grid={"lr": [1e-3]})
    assert first.startswith("sweep.zip=") and "as many values" in first
    assert second == "learning_rate.lr is swept twice; a parameter belongs to one of grid, zip, list"


@pytest.mark.parametrize(
    "sweep",
    [
        {"grid": {"seed": [1, 1]}},
        {"grid": {"lr": [1, 1.0]}},
        {"list": [{"seed": 42}, {}]},
        {"zip": {"lr": [1e-3, 1e-3], "seed": [1, 1]}},
        {"grid": {"dataset": [["a"], ("a",)]}},
    ],
)
def test_the_same_run_twice_is_a_fault(sweep: dict[str, Any]) -> None:
    assert RECIPE().training.seed == 42
    (fault,) = _faults(**sweep)
    assert fault.startswith("points 1 and 2 are the same run (")


def test_a_sweep_of_nothing() -> None:
    assert _faults() == ["sweep has no points: give it grid, zip or list"]
