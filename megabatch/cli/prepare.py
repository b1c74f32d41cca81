"""`megabatch prepare RECIPE.py [flags]`: tokenises a recipe's data now, for the run to find."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.cli.plan import load_recipe
from megabatch.config.flags import parse
from megabatch.config.recipe import Recipe
from megabatch.entry.declared import as_declared
from megabatch.entry.launch import Launch, prepare
from megabatch.entry.preflight import missing_inputs
from megabatch.errors import ConfigError, Fault
from megabatch.run_directory import RunDirectory
from megabatch.slurm.environment import job_variables

CACHE = "MEGABATCH_CACHE"


def prepare_recipe(path: Path, flags: Sequence[str]) -> int:
    """Exit code of the process that tokenises. Raises: ConfigError for a recipe with faults, or no shared cache."""
    recipe = as_declared(load_recipe(path), path)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} declares a chain; prepare the recipe file of one of its training steps")
    actions, chosen = parse(list(flags), recipe)
    if started := [name for name in ("submit", "local", "dry_run", "sweep") if getattr(actions, name)]:
        rule = "is not for preparing, which tokenises here; leave it out. A chain's Command runs it as a job"
        raise ConfigError([Fault(f"--{started[0]}", None, rule, bare=True)])
    launch = prepare(chosen, replace(actions, local=True), recipe_file=path.absolute())
    if faults := launch.faults() + missing_inputs(chosen, launch.model):
        raise ConfigError(faults)
    with tempfile.TemporaryDirectory(prefix="megabatch-prepare-") as folder:
        return _tokenise(replace(launch, directory=RunDirectory(Path(folder))))


def _tokenise(launch: Launch) -> int:
    directory = launch.directory
    directory.run_json.write_text(launch.run_json(provenance={}), encoding="utf-8")
    command = [sys.executable, "-m", "megabatch.trainer.prepare", str(directory.run_json)]
    return subprocess.run(command, env={**os.environ, CACHE: _cache_folder(launch)}, check=False).returncode


def _cache_folder(launch: Launch) -> str:
    """Where the run will look. Raises: ConfigError where that would be its own folder, which has no name yet."""
    variables = {variable.name: variable.value for variable in job_variables(launch.job, launch.profile)}
    found = variables.get(CACHE) or os.environ.get(CACHE)
    if not found:
        raise ConfigError(
            f"the run would not find the cache: set {CACHE}, here and where the run is submitted, or shared_cache in "
            "the cluster profile that --cluster names"
        )
    return found
