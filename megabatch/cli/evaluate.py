"""`megabatch evaluate RUN|FOLDER|RECIPE.py [--task TASK] [--dataset …] [flags]`: measures a model on held-out data."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from megabatch.cli.recipe_file import as_declared, load_recipe
from megabatch.config.flags import Actions
from megabatch.config.recipe import Recipe
from megabatch.config.run import EVALUATION
from megabatch.entry import evaluation
from megabatch.entry.launch import Launch, prepare
from megabatch.entry.launch_checks import faults_here, require_torch
from megabatch.errors import ConfigError
from megabatch.run_directory import ExitCode, RunDirectory, write_atomic
from megabatch.table import table
from megabatch.values import dataclass

_CACHE = "MEGABATCH_CACHE"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """Options of the command itself."""

    task: str | None = None
    checkpoint: str | None = None
    output: Path | None = None


def evaluate_target(target: Path, flags: Sequence[str], options: EvaluateOptions) -> int:
    """Exit code. Raises: MegabatchError with every fault that is visible before a rank starts."""
    evaluation.require_target(target)
    recipe = evaluation.evaluation_recipe(_recipe(target, options), flags, task=options.task)
    if evaluation.is_run(target):
        evaluation.require_reference(recipe, target)
    output = (options.output or _default_output(target)).absolute()
    require_torch()
    folder = Path(tempfile.mkdtemp(prefix=".evaluation-", dir=_made(output.parent)))
    try:
        launch = prepared(recipe, folder, target=target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    code = _run(launch, target)
    if code != ExitCode.DONE:
        print(
            f"error: the evaluation failed with exit code {code}; its logs are in {launch.directory.logs}",
            file=sys.stderr,
        )
        return code
    write_atomic(output, launch.directory.evaluation.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    print(_shown(json.loads(output.read_text(encoding="utf-8")), output))
    return code


def prepared(recipe: Recipe, folder: Path, *, target: Path) -> Launch:
    """The evaluation as a run in this folder, with its run.json. Raises: MegabatchError with every fault."""
    launch = prepare(recipe, Actions(local=True, run_dir=str(folder)), recipe_file=target.absolute())
    _require_faultless(launch)
    launch.config(provenance={EVALUATION: str(target)}).save(launch.directory.run_json)
    return launch


def _recipe(target: Path, options: EvaluateOptions) -> Recipe:
    if target.suffix == ".py":
        declared = as_declared(load_recipe(target), target)
        if not isinstance(declared, Recipe):
            raise ConfigError(f"{target.name} declares a chain; name one of its steps' folders, which are runs")
        return evaluation.untrained_recipe(declared)
    if evaluation.is_run(target):
        return evaluation.trained_recipe(target, checkpoint=options.checkpoint)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return evaluation.folder_recipe(target, task=options.task, gpus=gpus)


def _default_output(target: Path) -> Path:
    """In a job's own folder, beside a run, else here."""
    job = os.environ.get("MEGABATCH_RUN")
    if job is not None:
        return RunDirectory(Path(job)).evaluation
    run = target.absolute().parents[1] if target.absolute().parent.name == "checkpoints" else target
    return RunDirectory(run if evaluation.is_run(run) else Path.cwd()).evaluation


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); choose another with --output") from error
    return folder


def _require_faultless(launch: Launch) -> None:
    faults = launch.faults()
    if launch.model.fault is not None:
        faults.append(launch.model.fault)
    if faults := faults or faults_here(launch, local=True, trains=False):
        raise ConfigError(faults)


def _run(launch: Launch, target: Path) -> int:
    """Runs the ranks; tokens go to the run's own cache where that is what is evaluated."""
    from megabatch.slurm.local import run_local

    module = ("-P", "-m", "megabatch.trainer.evaluate", str(launch.directory.path))
    cache = target.absolute() / "cache"
    variables = {_CACHE: str(cache)} if _CACHE not in os.environ and cache.is_dir() else {}
    return run_local(replace(launch.job, arguments=module), launch.profile, variables=variables)


def _shown(document: Mapping[str, Any], output: Path) -> str:
    """A table of the metrics, and where they are."""
    counts = cast(dict[str, float], document["counts"])
    rows = [
        [name, "not defined" if value is None else f"{value:.6g}", f"{counts[name]:g}" if counts[name] != 1 else ""]
        for name, value in document["metrics"].items()
    ]
    ratio = document.get("split_dataset_ratio")
    part = f"the {ratio:.1%} set aside of " if ratio else ""
    head = f"{document['task']} of {document['model']}\n  on {part}{', '.join(document['dataset'])}"
    return f"{head}\n\n{table(['metric', 'value', 'mean over'], rows)}\n\n{output}"
