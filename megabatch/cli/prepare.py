"""`megabatch prepare RECIPE.py [--submit] [flags]`: tokenises a recipe's data before the run, for the run to find."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.cli.recipe_file import as_declared, load_recipe
from megabatch.config.flags import Actions, parse
from megabatch.config.recipe import Recipe
from megabatch.entry.data_counts import CACHE, cache_folder
from megabatch.entry.input_checks import missing_inputs
from megabatch.entry.launch import Launch, prepare
from megabatch.errors import ConfigError, Fault
from megabatch.run_directory import ExitCode, RunDirectory


def prepare_recipe(path: Path, flags: Sequence[str]) -> int:
    """Exit code of the process that tokenises, or of the submission of a job that does.

    Raises: ConfigError for a recipe with faults, or no shared cache.
    """
    recipe = as_declared(load_recipe(path), path)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} declares a chain; prepare the recipe file of one of its training steps")
    actions, chosen = parse(list(flags), recipe)
    _require_meant(actions)
    file = path.absolute()
    launch = prepare(chosen, replace(actions, local=True), recipe_file=file)
    if faults := launch.faults() + missing_inputs(chosen, launch.model, shared_cache=launch.profile.shared_cache):
        raise ConfigError(faults)
    cache = _cache_folder(launch)
    if actions.submit or actions.dry_run:
        return _as_job(recipe, chosen, actions, flags, file=file, cache=cache)
    with tempfile.TemporaryDirectory(prefix="megabatch-prepare-") as folder:
        return _tokenise(replace(launch, directory=RunDirectory(Path(folder))), cache=cache)


def _require_meant(actions: Actions) -> None:
    given = [name for name in ("local", "sweep", "chain", "max_parallel", "keep_all", "gpu") if getattr(actions, name)]
    if not (actions.submit or actions.dry_run) and actions.run_dir:
        given.append("run_dir")
    rule = "has no effect on a preparation, which tokenises here, or as a job with --submit; leave it out"
    faults = [Fault(f"--{name}", None, rule, bare=True) for name in given]
    if actions.submit and actions.dry_run:
        faults.append(Fault("--submit and --dry_run", None, "exclude each other; give one of them", bare=True))
    if faults:
        raise ConfigError(faults)


def _as_job(recipe: Recipe, chosen: Recipe, actions: Actions, flags: Sequence[str], *, file: Path, cache: str) -> int:
    from megabatch.entry.command import queue, start
    from megabatch.entry.launch_checks import folder_faults
    from megabatch.entry.mounts import unmounted
    from megabatch.entry.preparation import preparation
    from megabatch.slurm.render import render

    def prepared() -> Launch:
        launch = preparation(recipe, chosen, actions, recipe_file=file, cache=cache)
        place = folder_faults(launch.directory.path, recipe_file=file, local=False)
        if faults := [*place, *unmounted(launch), *_hidden(launch, cache)]:
            raise ConfigError(faults)
        return launch

    if actions.submit:
        return start(queue, prepared, flags)
    launch = prepared()
    print(f"tokenises for {chosen.name} into {cache}, in {launch.directory.path}", file=sys.stderr, flush=True)
    sys.stdout.write(render(launch.job, launch.profile))
    return ExitCode.DONE


def _hidden(launch: Launch, cache: str) -> list[Fault]:
    """Whether a container would write the tokens to a folder that is not mounted from the host."""
    from megabatch.slurm.container import mounted

    folder = Path(os.path.realpath(cache))
    shown = (Path(os.path.realpath(path)) for path in mounted(launch.job, launch.profile))
    if any(folder.is_relative_to(path) for path in shown):
        return []
    rule = f"is not mounted in the container; add {cache!r} to container.mounts of the profile"
    return [Fault(CACHE, cache, rule)]


def _tokenise(launch: Launch, *, cache: str) -> int:
    directory = launch.directory
    directory.run_json.write_text(launch.run_json(provenance={}), encoding="utf-8")
    command = [sys.executable, "-m", "megabatch.data.prepare", str(directory.run_json)]
    return subprocess.run(command, env={**os.environ, CACHE: cache}, check=False).returncode


def _cache_folder(launch: Launch) -> str:
    """Where the run will look. Raises: ConfigError if that is the run's own folder, which has no name yet."""
    found = cache_folder(launch)
    if found is None:
        raise ConfigError(
            f"the run would not find the cache: set {CACHE} both here and when you submit the run, or shared_cache in "
            "the cluster profile that --cluster names"
        )
    return str(found)
