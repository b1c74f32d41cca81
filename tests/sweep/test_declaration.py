"""A sweep declared in Python in ways that its types do not say is refused by name, never by a traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch import Sweep
from megabatch.cli.recipe_command import main
from megabatch.cli.recipe_file import load_recipe

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.py")


def _run(capsys: pytest.CaptureFixture[str], **sweep: Any) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(Sweep(RECIPE, **sweep), ["--dry_run"])
    return int(ended.value.code or 0), capsys.readouterr().err


SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"grid": [("seed", [1])]}, "sweep.grid=[('seed', [1])] must be a dictionary of parameters and lists of"),
        ({"zip": "seed=1"}, "sweep.zip='seed=1' must be a dictionary"),
        ({"grid": {1: [1]}}, "sweep.grid[1] must be a parameter's name, which is text"),
        ({"zip": {("lr", "seed"): [1]}}, "sweep.zip[('lr', 'seed')] must be a parameter's name"),
        ({"list": {"seed": [1]}}, "sweep.list={'seed': [1]} must be a list of dictionaries"),
        ({"list": [{"seed": 1}, "seed=2"]}, "sweep.list[1]='seed=2' must be a dictionary of parameters and values"),
        ({"list": [{None: 1}]}, "sweep.list[0][None] must be a parameter's name"),
        ({"list": [{"lr": 1e-5, "learning_rate.lr": 2e-5}]},
         "sweep.list[0]['learning_rate.lr'] is given twice: it is learning_rate.lr"),
        ({"list": [{}, {}]}, "points 1 and 2 are the same run (the recipe itself); leave one of them out"),
        ({"grid": {"lr": np.array([1e-5])}}, "must be a list of values; try its .tolist()"),
        ({"grid": {"lr": [np.float64(1e-5)]}}, "must be a number or None, not numpy.float64; try its .item()"),
        ({"grid": {"seed": {1, 2}}}, "sweep.grid['seed']={1, 2} must be a list of values; try list(…) of it"),
        ({"grid": {"dataset": [[Path("a.jsonl")]]}}, "try [str(path) for path in paths]"),
        ({"grid": {"seed": ["1"]}}, "sweep.grid['seed']='1' must be a whole number, not str"),
        ({"grid": {"job_name": ["a", "b"]}}, "sweep.grid['job_name'] cannot be swept: it is of the whole sweep"),
        ({"grid": {"wandb_exp_name": [SECRET]}}, "sweep.grid['wandb_exp_name'] holds a Hugging Face token"),
        ({"grid": {"seed": [1]}, "max_parallel": 0}, "sweep.max_parallel=0 must be a whole number, at least 1"),
        ({"grid": {"seed": [1]}, "max_parallel": "2"}, "sweep.max_parallel='2' must be a whole number"),
        ({"grid": {"seed": [1]}, "name": "a\nb"}, "sweep.name='a\\nb' names a folder: it must not be blank"),
        ({"grid": {"seed": [1]}, "name": ""}, "sweep.name='' names a folder: it must not be blank"),
        ({"grid": {"seed": [1]}, "name": "x" * 201}, "sweep.name has 201 characters, above 200"),
        ({"grid": {"seed": [1]}, "name": 5}, "sweep.name=5 must be text or None"),
        ({"grid": {"seed": [1]}, "filter": "lr"}, "sweep.filter='lr' must be a function"),
        ({"grid": {"seed": [1]}, "filter": lambda _: sys.exit(3)}, "it may not end the program: return or define"),
        ({"grid": {"seed": [1]}, "filter": lambda _: os.chdir("/")}, "changes the current folder to /"),
        ({}, "sweep has no points: give it grid, zip or list"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(
    sweep: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = _run(capsys, **sweep)
    assert code == 2 and said in shown, shown
    assert SECRET not in shown and Path.cwd() == tmp_path


def test_the_job_name_of_a_recipe_is_the_arrays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, name in (([], "quickstart"), (["--job_name", "night"], "night")):
        with pytest.raises(SystemExit) as ended:
            main(Sweep(RECIPE, grid={"seed": [1, 2]}), ["--dry_run", *flags])
        assert not ended.value.code
        script = capsys.readouterr().out
        assert f"#SBATCH --job-name={json.dumps(name).strip(chr(34))}\n" in script.partition("# ")[0]
