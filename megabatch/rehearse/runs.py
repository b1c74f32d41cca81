"""The small runs that rehearsals and checks make here: prepared, described, and required to end as they should."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megabatch.config.flags import Actions, parse
from megabatch.config.recipe import Recipe
from megabatch.entry.launch import Launch, prepare
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.plan.shape import ModelShape
from megabatch.rehearse.interruptions import ENDINGS
from megabatch.rehearse.shrink import Small
from megabatch.slurm.job import JobSpec


def opened(recipe: Recipe, recipe_file: Path, flags: Sequence[str]) -> tuple[Recipe, Launch]:
    """The recipe with its flags, and its launch. Raises: ConfigError with all faults of flags."""
    actions, chosen = parse(flags, recipe)
    _refuse(actions)
    return chosen, prepare(chosen, actions, recipe_file=recipe_file.absolute())


def shape_of(launch: Launch) -> ModelShape:
    """Raises: ConfigError if it is unknown."""
    if launch.model.shape is None:
        raise ConfigError(f"the model's shape is not known ({launch.model.origin}); download it, or give its folder")
    return launch.model.shape


def most_ranks() -> int:
    """How many processes this machine can run."""
    return max(4, 2 * (os.cpu_count() or 1))


def _refuse(actions: Actions) -> None:
    """Raises: ConfigError with every flag that asks for anything but a local run."""
    none = Actions(cluster=actions.cluster)
    asked = [field.name for field in fields(Actions) if getattr(actions, field.name) != getattr(none, field.name)]
    rule = "has no effect on a rehearsal or a check, which runs here; --dir keeps its runs"
    if asked:
        raise ConfigError([Fault(f"--{name}", None, rule, bare=True) for name in asked])


def prepared(recipe: Recipe, recipe_file: Path, folder: Path) -> JobSpec:
    """A run directory with its run.json, and the job that runs there."""
    launch = prepare(recipe, Actions(local=True, run_dir=str(folder)), recipe_file=recipe_file.absolute())
    folder.mkdir(parents=True)
    launch.config(provenance={"rehearsal": str(recipe_file)}).save(launch.directory.run_json)
    return launch.job


def say_what(doing: str, small: Small, whole: Launch) -> None:
    """Prints what runs, and which parts of the recipe do not."""
    parallel = small.recipe.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    world = small.recipe.resources.world_size
    of = f" of the recipe's {whole.job.world_size}" if whole.job.world_size != world else ""
    print(f"{doing} {small.recipe.name} on {world} CPU processes{of}{f' ({layout})' if layout else ''}")
    for note in small.left_out:
        print(f"  left out: {note}")


def require(code: int, wanted: int, job: JobSpec, what: str) -> None:
    """Prints how a run ended. Raises: LaunchError if it is not the expected end."""
    if code != wanted:
        raise LaunchError(f"{what}: ended with exit code {code}, not {wanted}; its logs are in {job.files.logs}")
    print(f"  {what:56} {ENDINGS[wanted]}", flush=True)
