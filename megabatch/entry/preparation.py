"""The preparation of a recipe's data as its own job: one task on a node without GPUs, in a folder beside the runs'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megabatch.config.flags import Actions
from megabatch.config.recipe import Recipe
from megabatch.config.resources import Resources
from megabatch.config.run import save_folder
from megabatch.entry.launch import Launch, prepare
from megabatch.errors import ConfigError, Fault

_TIME = "4:00:00"
_ASKED_FOR = ("cpus_per_task", "mem_gib", "time", "job_name", "requeue", "omp_num_threads", "signal_delay_s")
"""Fields that apply to a job that tokenises; the rest of `resources` is about the later run."""


def preparation(declared: Recipe, chosen: Recipe, actions: Actions, *, recipe_file: Path, cache: str) -> Launch:
    """The job; nothing is on disk yet.

    Args: `declared` is the recipe without the flags of `chosen`; `cache` is where the run will look for tokens.
    Raises: ConfigError as `prepare` does, and for flags that do not apply to such a job.
    """
    changed = [f.name for f in fields(Resources) if _value(declared, f.name) != _value(chosen, f.name)]
    if faults := list(_of_the_run(changed)):
        raise ConfigError(faults)
    beside = replace(chosen.checkpoint, save=f"{save_folder(chosen)}-prepare", add_version=True)
    launch = prepare(replace(chosen, checkpoint=beside), actions, recipe_file=recipe_file)
    own = replace(Resources(time=_TIME), **{name: _value(chosen, name) for name in changed})
    job = replace(
        launch.job,
        name=own.job_name or f"{chosen.name}-prepare",
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=0,
        cpus_per_task=own.cpus_per_task or chosen.data.dataset_num_proc,
        omp_num_threads=own.omp_num_threads or 1,
        mem_gib=own.mem_gib,
        time=own.time,
        preflight="none",
        hang_timeout_s=0,
        roles=(),
        environment={**launch.job.environment, "MEGABATCH_CACHE": cache},
        arguments=("-P", "-m", "megabatch.data.prepare", str(launch.directory.run_json)),
    )
    return replace(launch, job=job, profile=launch.profile.of_preparation())


def _value(recipe: Recipe, name: str) -> Any:
    return getattr(recipe.resources, name)


def _of_the_run(changed: list[str]) -> Iterator[Fault]:
    for name in changed:
        if name not in _ASKED_FOR:
            rule = "has no effect on a preparation, which is one task on a node without GPUs; leave it out"
            yield Fault(f"--{name}", None, rule, bare=True)
