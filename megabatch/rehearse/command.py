"""`megabatch rehearse RECIPE.py`: runs a small version twice, once with a stop and a kill, and compares the two."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megabatch.config.flags import Actions, parse
from megabatch.config.recipe import Recipe
from megabatch.entry.launch import Launch, prepare
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.rehearse.compare import Verdict, compare
from megabatch.rehearse.interruptions import ENDINGS, killed, moments, stopped, uninterrupted
from megabatch.rehearse.shrink import Small, shrink
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a recipe is rehearsed."""

    steps: int = 20
    seed: int = 0
    """Decides when the run is stopped and killed, and which rank dies."""
    folder: Path | None = None
    """Where both runs stay for a look; None takes a temporary folder, kept only where they differ."""


def rehearse(recipe: Recipe, recipe_file: Path, flags: Sequence[str], settings: Settings) -> int:
    """Prints the verdict; 0 when the resumed run equals the uninterrupted one. Raises: MegabatchError."""
    if settings.steps < 12:
        raise ConfigError("--steps must be at least 12, to leave room for a stop and a kill")
    actions, chosen = parse(flags, recipe)
    _refuse(actions)
    whole = prepare(chosen, actions, recipe_file=recipe_file.absolute())
    if whole.model.shape is None:
        raise ConfigError(f"the model's shape is not known ({whole.model.origin}); download it, or give its folder")
    ranks = max(4, 2 * (os.cpu_count() or 1))
    small = shrink(chosen, whole.model.shape, steps=settings.steps, max_ranks=ranks)
    folder = settings.folder or Path(tempfile.mkdtemp(prefix="megabatch-rehearsal-"))
    jobs = [_prepared(small, recipe_file, folder / name) for name in ("uninterrupted", "resumed")]
    _say_what(small, whole)
    verdicts = _run(jobs[0], jobs[1], settings)
    same = all(verdict.difference is None for verdict in verdicts)
    for verdict in verdicts:
        print(f"  {verdict.what:56} {verdict.difference or 'equal, bit for bit'}")
    print(f"{chosen.name}: {'resumes bit for bit' if same else f'DOES NOT RESUME EXACTLY; both runs are in {folder}'}")
    if same and settings.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if same else 1


def _refuse(actions: Actions) -> None:
    """Raises: ConfigError with every flag that asks for another thing than a rehearsal."""
    none = Actions(cluster=actions.cluster)
    asked = [field.name for field in fields(Actions) if getattr(actions, field.name) != getattr(none, field.name)]
    rule = "has no effect on a rehearsal, which runs here; --dir keeps its runs"
    if asked:
        raise ConfigError([Fault(f"--{name}", None, rule, bare=True) for name in asked])


def _prepared(small: Small, recipe_file: Path, folder: Path) -> JobSpec:
    """A run directory with its run.json, and the job that runs there."""
    launch = prepare(small.recipe, Actions(local=True, run_dir=str(folder)), recipe_file=recipe_file.absolute())
    folder.mkdir(parents=True)
    launch.config(provenance={"rehearsal": str(recipe_file)}).save(launch.directory.run_json)
    return launch.job


def _say_what(small: Small, whole: Launch) -> None:
    parallel = small.recipe.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    world = small.recipe.resources.world_size
    of = f" of the recipe's {whole.job.world_size}" if whole.job.world_size != world else ""
    print(f"rehearsing {small.recipe.name} on {world} CPU processes{of}{f' ({layout})' if layout else ''}")
    for note in small.not_rehearsed:
        print(f"  not rehearsed: {note}")


def _run(whole: JobSpec, resumed: JobSpec, settings: Settings) -> list[Verdict]:
    stop, kill, rank = moments(settings.steps, ranks=whole.world_size, seed=settings.seed)
    _require(uninterrupted(whole), ExitCode.DONE, whole, f"uninterrupted, {settings.steps} steps")
    _require(stopped(resumed, step=stop), ExitCode.REQUEUE, resumed, f"asked to stop after step {stop}")
    _require(killed(resumed, step=kill, rank=rank), 137, resumed, f"resumed; rank {rank} killed after step {kill}")
    _require(uninterrupted(resumed), ExitCode.DONE, resumed, "resumed, to the end")
    return compare(whole.files, resumed.files, steps=settings.steps)


def _require(code: int, wanted: int, job: JobSpec, what: str) -> None:
    if code != wanted:
        raise LaunchError(f"{what}: ended with exit code {code}, not {wanted}; its logs are in {job.files.logs}")
    print(f"  {what:56} {ENDINGS[wanted]}", flush=True)
