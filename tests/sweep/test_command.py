"""A sweep's table, scripts and refusals on a machine without Slurm."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import RECIPES, Run

WriteSweep = Callable[..., Path]
LAYOUTS = RECIPES / "sweeps" / "qwen3_moe_layouts.py"


def _rows(table: str) -> dict[str, str]:
    """First columns → verdict of each line."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {" ".join(cells[:-1]): cells[-1] for cells in lines if len(cells) > 1}


def test_every_point_is_kept_or_pruned_with_its_reason(run: Run, tmp_path: Path) -> None:
    """On CPUs rules alone prune; nothing is made."""
    sweep = ["--sweep", "tensor_model_parallel_size=1,2,4", "pipeline_model_parallel_size=1,2"]
    flags = ["--dry_run", "--max_parallel", "3", "--expert_model_parallel_size", "1"]
    done = run(RECIPES / "quickstart.py", *flags, *sweep)
    rows = _rows(done.stderr)
    assert next(iter(rows)) == "tp pp dp" and rows["1 1 2"] == rows["1 2 1"] == "run"
    assert rows["2 1 1"].startswith("pruned: parallel.sequence_parallel=False must be true")
    assert rows["4 1 -"].startswith("pruned: ") and len(rows) == 7
    assert "2 runs in 1 array of 2, at most 2 at a time, 2 ranks each; 4 pruned" in done.stderr
    script, _, first = done.stdout.partition("\n# /")
    assert "#SBATCH --array=0-1%2\n" in script and script.count("tp1-pp") == 2
    assert f"/{first}".startswith(str(tmp_path / "work/megatron_output/quickstart/quickstart/tp1-pp1/job.sbatch"))
    assert subprocess.run(["/bin/bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert list((tmp_path / "work").iterdir()) == []


def test_memory_prunes_by_the_gpu_and_can_be_overruled(run: Run) -> None:
    small = ["--sweep", "expert_model_parallel_size=2", "pipeline_model_parallel_size=1"]
    on_h100 = run(LAYOUTS, "--dry_run", *small, code=2).stderr
    assert re.search(r"pruned: \d+\.\d GiB > 71.2 GiB \(\w+ \d+\.\d, \w+ \d+\.\d\)", on_h100)
    assert "error: 3 faults, nothing was started\n  every point is pruned: " in on_h100
    on_h200 = run(LAYOUTS, "--dry_run", "--gpu", "h200", *small).stderr
    assert "pruned" not in on_h200 and re.search(r"about \d+\.\d+ GPU-hours; estimated for H200", on_h200)
    assert _rows(run(LAYOUTS, "--dry_run", "--keep_all", *small).stderr).popitem()[1] == "run"
    assert "gpu='x' is not known; there are A100" in run(LAYOUTS, "--dry_run", "--gpu", "x", code=2).stderr


def test_the_profiles_gpu_is_judged_for_unless_a_flag_names_another(run: Run, tmp_path: Path) -> None:
    profile = tmp_path / "cluster.toml"
    profile.write_text('gpu = "H200"\n')
    small = ["--cluster", str(profile), "--sweep", "expert_model_parallel_size=2", "pipeline_model_parallel_size=1"]
    on_h200 = run(LAYOUTS, "--dry_run", *small).stderr
    assert "pruned" not in on_h200 and "estimated for H200" in on_h200
    assert "GiB > 71.2 GiB" in run(LAYOUTS, "--dry_run", *small, "--gpu", "H100", code=2).stderr


def test_a_secret_that_points_share_is_refused(run: Run) -> None:
    secret = '--megatron_extra_kwargs={"wandb_api_key": "hunter2"}'
    done = run(RECIPES / "quickstart.py", "--submit", "--sweep", "lr=0.1,0.2", secret, code=2)
    assert "training.megatron_extra_kwargs holds `wandb_api_key`" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_groups_that_cross_nodes_are_pruned(run: Run) -> None:
    flags = ["--nodes", "4", "--pipeline_model_parallel_size", "1", "--decoder_first_pipeline_num_layers", "none"]
    sweep = ["--sweep", "tensor_model_parallel_size=4", "expert_model_parallel_size=16"]
    done = run(RECIPES / "qwen3_moe_sft.py", "--dry_run", "--global_batch_size", "8", *flags, *sweep, code=2)
    assert "pruned: ep crosses nodes of 8 GPUs" in done.stderr


def test_what_the_filter_leaves_out_is_shown(run: Run, write_sweep: WriteSweep) -> None:
    file = write_sweep("grid={'seed': [1, 2, 3]}, filter=lambda recipe: recipe.training.seed != 2")
    assert _rows(run(file, "--dry_run").stderr)["2"] == "pruned: rejected by the sweep's filter"


def test_a_filter_that_fails_is_a_fault_of_the_configuration(run: Run, write_sweep: WriteSweep) -> None:
    fails = "lambda recipe: 1 / (recipe.training.seed - 2) < 9"
    file = write_sweep(f"grid={{'seed': [1, 2, 3], 'lr': [1e-3]}}, filter={fails}")
    for action in ("--dry_run", "--submit", "--local"):
        assert run(file, action, code=2).stderr == (
            "error: 1 fault, nothing was started\n  sweep.filter fails for point lr0.001-seed2 "
            "(training.seed=2, learning_rate.lr=0.001): sweep.py:8: ZeroDivisionError: division by zero\n"
        )


def test_shapes_are_arrays_of_their_own(run: Run) -> None:
    done = run(RECIPES / "quickstart.py", "--dry_run", "--sweep", "nodes=1,2", "seed=1,2,3")
    assert "6 runs in 2 arrays of 3 and 3" in done.stderr
    assert done.stdout.count("#SBATCH --array=0-2\n") == 2 and "/arrays/1/batch.log" in done.stdout


def test_what_is_not_built_is_shown_and_refused(run: Run, tmp_path: Path) -> None:
    file = RECIPES / "grpo_ablations.py"
    unbuilt = ["--use_ray", "true"]
    done = run(file, "--dry_run", *unbuilt)
    assert "18 runs in 1 array of 18" in done.stderr and "#SBATCH --array=0-17%4\n" in done.stdout
    assert "refused here: rollout.use_ray=True needs no Ray" in done.stderr
    refused = run(file, "--submit", *unbuilt, code=2)
    assert "rollout.use_ray=True needs no Ray" in refused.stderr
    assert "nothing was started" in refused.stderr
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "tensor_parallel=1,2"], "try tensor_model_parallel_size"),
        (["--sweep"], "--sweep needs at least one parameter=value,value; try --sweep seed=1,2,3"),
        (["--sweep", "seed=1,1"], "points 1 and 2 are the same run (training.seed=1)"),
        (["--sweep", "seed=1", "--seed", "2"], "--seed is swept, so a single value has no effect"),
        (["--sweep", "seed=1", "--max_parallel", "0"], "--max_parallel='0' must be a whole number, at least 1"),
        (["--sweep", "seed=1", "--chain", "2"], "--chain=2 is for a single run"),
        (["--max_parallel", "2"], "--max_parallel has an effect only on a sweep; add --sweep"),
        (["--sweep", "seed=1", "--submit", "--local"], "exclude each other"),
        (["--sweep", "lr=1e-9", "--submit"], "learning_rate.min_lr=0.0005 must be at most lr"),
    ],
)
def test_mistakes_get_one_clear_error(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(RECIPES / "quickstart.py", *arguments, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_names_that_are_no_folders(run: Run, write_sweep: WriteSweep) -> None:
    done = run(write_sweep("grid={'seed': [1]}, name='../x'"), "--dry_run", code=2)
    assert "sweep.name='../x' names a folder" in done.stderr


def test_without_slurm_a_submission_leaves_nothing(run: Run, tmp_path: Path) -> None:
    done = run(RECIPES / "quickstart.py", "--submit", "--sweep", "seed=1,2", code=1)
    assert "sbatch and srun not found" in done.stderr
    assert list((tmp_path / "work").glob("megatron_output/*/quickstart")) == []


def test_hostile_values_do_nothing(run: Run, write_sweep: WriteSweep, tmp_path: Path) -> None:
    values = ["$(touch pwned)", "`touch pwned`", "a\nb", 'it\'s "x"', "--help", "ü; touch pwned"]
    done = run(write_sweep(f"grid={{'system': {values!r}}}"), "--dry_run")
    subprocess.run(["/bin/bash", "-n"], input=done.stdout, text=True, check=True)
    assert "touch pwned" not in done.stdout and len(done.stderr.splitlines()) == 8
    assert not list(tmp_path.rglob("pwned"))
