"""Each recipe's run.json and job script, as files: `make golden` rewrites them, and the diff is reviewed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.chain.declare import Chain
from megabatch.cli.recipe_command import run
from megabatch.cli.recipe_file import load_declared, load_recipe
from megabatch.config.flags import parse
from megabatch.config.rules.check import check
from megabatch.config.run import RunConfig, resolve
from megabatch.entry.evaluation import evaluation_recipe
from megabatch.entry.launch import Launch, prepare
from megabatch.slurm.render import render
from megabatch.sweep.declare import Sweep

RECIPES = Path(__file__).parents[2] / "recipes"
GOLDENS = Path(__file__).with_name("goldens")
FILES = sorted(RECIPES.glob("*.py")) + sorted((RECIPES / "sweeps").glob("*.py"))
SWEEPS = {path.stem: path for path in FILES if isinstance(load_declared(path), Sweep)}
CHAINS = {path.stem for path in FILES if path.stem not in SWEEPS and isinstance(load_declared(path)(), Chain)}
NAMES = [path.stem for path in FILES if path.stem not in {*SWEEPS, *CHAINS}]


@pytest.fixture
def launch(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A recipe's launch with all that depends on this machine replaced."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    name = request.param
    file = RECIPES / f"{name}.py"
    actions, recipe = parse(["--run_dir", f"/shared/runs/{name}", "--save", "/shared/runs"], load_recipe(file)())
    ready = prepare(recipe, actions, recipe_file=file)
    job = replace(ready.job, python="/shared/venv/bin/python", snapshot=Path("/shared/runs/code/0123456789abcdef.tar"))
    return replace(ready, job=job)


def _compare(golden: Path, text: str) -> None:
    if os.environ.get("MEGABATCH_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "if this change is meant: make golden, and review the diff"


@pytest.mark.parametrize("launch", NAMES, indirect=True, ids=NAMES)
def test_run_json(launch: Launch, tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    launch.config(provenance={}).save(written)
    _compare(GOLDENS / f"{launch.recipe_file.stem}.json", written.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_run_json_resolves_to_itself(name: str) -> None:
    """What was derived is no fault, and nothing else follows from it."""
    run = RunConfig.load(GOLDENS / f"{name}.json")
    assert resolve(run.recipe, shape=run.shape, run_dir=Path(run.run_dir), provenance={}) == run


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_evaluated(name: str) -> None:
    """Its schedule, checkpoints and batch are of its training. An evaluation takes one node."""
    recipe, shape = load_recipe(RECIPES / f"{name}.py")(), RunConfig.load(GOLDENS / f"{name}.json").shape
    if recipe.resources.nodes == 1:
        assert not check(evaluation_recipe(recipe, ["--dataset", "rows.jsonl"], task=None), shape)


@pytest.mark.parametrize("launch", NAMES, indirect=True, ids=NAMES)
def test_job_script(launch: Launch) -> None:
    _compare(GOLDENS / f"{launch.recipe_file.stem}.sbatch", render(launch.job, launch.profile))


@pytest.mark.parametrize("name", SWEEPS)
def test_array_script(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every point that the rules allow, since estimates grow better; what an element hands over to is a job's."""
    for variable in ("HF_HOME", "MODELSCOPE_CACHE", "PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    flags = ["--dry_run", "--keep_all", "--run_dir", f"/shared/{name}", "--save", "/shared"]
    assert run(load_declared(SWEEPS[name]), flags) == 0
    array, marker, _ = capsys.readouterr().out.partition("\n# /shared")
    assert marker
    _compare(GOLDENS / f"{name}.sbatch", re.sub(r"\b[0-9a-f]{64}$", "SHA-256", array, flags=re.MULTILINE))


def test_every_golden_has_its_recipe() -> None:
    scripts, configs = {f"{name}.sbatch" for name in (*NAMES, *SWEEPS)}, {f"{name}.json" for name in NAMES}
    assert {path.name for path in GOLDENS.iterdir()} == scripts | configs
