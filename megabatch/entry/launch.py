"""Prepares a launch from a recipe: its run directory, its job, and, once it may run, what is written before it
starts."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch.config.declare import group_types
from megabatch.config.flags import Actions
from megabatch.config.layout import layout_of
from megabatch.config.lengths import generates
from megabatch.config.monitoring import TRACKER_KEYS
from megabatch.config.recipe import Recipe
from megabatch.config.resources import Resources
from megabatch.config.rules.check import check
from megabatch.config.rules.fields import invalid_fields
from megabatch.config.run import RunConfig, resolve, run_json
from megabatch.config.served_models import REFERENCE, TEACHER
from megabatch.config.user_code import user_code
from megabatch.entry.model import FoundModel, find_model
from megabatch.entry.paths import absolute_paths, code_store, run_directory
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.run_directory import RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.launcher_lock import already_locked, launcher_lock
from megabatch.slurm.ownership import require_own
from megabatch.slurm.profile import ClusterProfile, load_profile
from megabatch.slurm.snapshot import Snapshot, snapshot_of
from megabatch.user_code import files_to_archive
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A recipe and every decision about its run; nothing is on disk yet."""

    recipe: Recipe
    """As declared, with flags; paths are as the user wrote them."""
    recipe_file: Path
    model: FoundModel
    layout: Layout | None
    """None if the recipe's sizes do not divide."""
    directory: RunDirectory
    code: Snapshot | None
    """The code that it runs on a cluster; None for a run on this machine."""
    job: JobSpec
    cluster: str | None
    profile: ClusterProfile
    numbered: bool = False
    """We chose the run directory's name for this launch: an existing run of that name is another launcher's."""

    def faults(self) -> list[Fault]:
        """Every broken rule of the recipe."""
        return check(self.recipe, self.model.shape, values_are_valid=True)  # `prepare` refuses all others

    def config(self, *, provenance: Mapping[str, Any], existing: RunConfig | None = None) -> RunConfig:
        """What run.json will hold. Raises: ConfigError for a recipe with faults or a model of unknown shape.

        Args: existing: the run that an earlier launch began; sizes that were chosen for it then are chosen again.
        """
        recipe, shape = self._to_resolve()
        if not check(recipe, shape):  # else `resolve` raises them
            recipe = _with_chosen(recipe, shape, existing)
        return resolve(recipe, shape=shape, run_dir=self.directory.path, provenance=provenance)

    def run_json(self, *, provenance: Mapping[str, Any]) -> str:
        """Its text, for a recipe known to have no faults. Raises: ConfigError for a model of unknown shape."""
        recipe, shape = self._to_resolve()
        recipe = _with_chosen(recipe, shape, None)
        return run_json(recipe, shape=shape, run_dir=self.directory.path, provenance=provenance)

    def _to_resolve(self) -> tuple[Recipe, ModelShape]:
        """The recipe with paths as the ranks need them, and the model's shape."""
        if self.model.shape is None:
            raise ConfigError(
                f"the shape of model.model={self.recipe.model.model!r} is not known: {self.model.origin}"
            )
        recipe = absolute_paths(self.recipe)
        if self.model.folder is not None:
            recipe = replace(recipe, model=replace(recipe.model, model=str(self.model.folder)))
        return recipe, self.model.shape


def _with_chosen(recipe: Recipe, shape: ModelShape, existing: RunConfig | None) -> Recipe:
    """With what a recipe without faults leaves to the plan: `grpo.infer_batch_size`."""
    if not generates(recipe) or recipe.grpo.infer_batch_size is not None:
        return recipe
    from megabatch.entry.infer_batch import default_infer_batch_size, with_infer_batch_size  # few tasks need the plan

    chosen = default_infer_batch_size(recipe, shape) if existing is None else existing.recipe.grpo.infer_batch_size
    return recipe if chosen is None else with_infer_batch_size(recipe, shape, chosen)


def prepare(recipe: Recipe, actions: Actions, *, recipe_file: Path, code: Snapshot | None = None) -> Launch:
    """Decides everything about a run without writing anything.

    Args: `code`, if it has already been read.
    Raises: ConfigError for values of a wrong type, with all other faults, and for a faulty cluster profile.
    """
    if _has_invalid_values(recipe):
        raise ConfigError(check(recipe))
    profile = load_profile(actions.cluster) if actions.cluster else ClusterProfile()
    model = find_model(recipe, shared_cache=profile.shared_cache)
    directory = RunDirectory(run_directory(recipe, given=actions.run_dir))
    if actions.local:
        code = None
    elif code is None:
        own = files_to_archive(user_code(recipe))
        code = snapshot_of(code_store(recipe, given=actions.run_dir), recipe=recipe_file, further=own)
    return Launch(
        recipe=recipe,
        recipe_file=recipe_file,
        model=model,
        layout=layout_of(recipe, model.shape),
        directory=directory,
        code=code,
        job=job_of(recipe, directory, snapshot=None if code is None else code.path),
        cluster=actions.cluster,
        profile=profile,
        numbered=recipe.checkpoint.add_version and not actions.run_dir,
    )


def _has_invalid_values(recipe: Recipe) -> bool:
    """Whether a group or field has the wrong type, so that nothing can be computed from it."""
    wrong_group = any(not isinstance(getattr(recipe, name), group) for name, group in group_types(Recipe).items())
    return wrong_group or any(True for _ in invalid_fields(recipe))


def plain_job(resources: Resources, *, name: str, folder: Path) -> JobSpec:
    """A job with these resources; without more, one that does not train."""
    return JobSpec(
        name=resources.job_name or name,
        run_directory=folder,
        nodes=resources.nodes,
        tasks_per_node=resources.ranks_per_node,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_task=resources.cpus_per_task,
        omp_num_threads=resources.omp_num_threads,
        mem_gib=resources.mem_gib,
        time=resources.time,
        signal_delay_s=resources.signal_delay_s,
        requeue=resources.requeue,
        max_requeues_without_progress=resources.max_requeues_without_progress,
        hang_timeout_s=0,
        python=sys.executable,
    )


def job_of(recipe: Recipe, directory: RunDirectory, *, snapshot: Path | None) -> JobSpec:
    """The launcher's view of a run."""
    resources = recipe.resources
    return replace(
        plain_job(resources, name=recipe.name, folder=directory.path),
        preflight=resources.preflight_level,
        max_bad_nodes=resources.max_bad_nodes,
        hang_timeout_s=60 * resources.hang_timeout_min,
        snapshot=snapshot,
        inherit=_secrets_named(recipe),
        roles=tuple(recipe.roles),
    )


def _secrets_named(recipe: Recipe) -> tuple[str, ...]:
    """Variables of the submitting shell that the ranks need."""
    key = TRACKER_KEYS.get(recipe.logging.report_to or "")
    servers = (model.key_variable_of(recipe) for model in (TEACHER, REFERENCE))
    named = (recipe.bridge.hub_token, key, recipe.rewards.judge_api_key_variable, *servers)
    return tuple(name for name in named if name)


@contextmanager
def written(launch: Launch, arguments: Sequence[str]) -> Iterator[RunDirectory]:
    """Writes run.json and holds the run directory's lock; removes it if the body fails before the run starts.

    A directory that already holds this same run is used as it is: the run resumes from its last checkpoint.
    Raises: ConfigError when it holds another run, LockedError when another launcher has it, LaunchError when it cannot
    be written, or belongs to another user.
    """
    directory = launch.directory
    made = [path for path in (directory.path, *directory.path.parents) if not path.exists()]
    with ExitStack() as held:
        with _writable(directory, made):
            directory.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            require_own(directory.path, directory.run_json)
            held.enter_context(launcher_lock(directory))
        if not directory.run_json.exists():
            held.enter_context(_new_run(launch, arguments, made))
        elif launch.numbered:
            raise already_locked(directory)
        else:
            existing = RunConfig.load(directory.run_json)
            _require_same(existing, launch.config(provenance=existing.provenance, existing=existing))
        yield directory


@contextmanager
def _new_run(launch: Launch, arguments: Sequence[str], made: list[Path]) -> Iterator[None]:
    directory = launch.directory
    for name, what in (("sweep.json", "a sweep"), ("chain.json", "a chain")):
        if (directory.path / name).exists():
            raise ConfigError(f"{directory.path} is the folder of {what}, not of a run; choose another --run_dir")
    try:
        config = launch.config(provenance=provenance(launch, arguments))
    except BaseException:
        _take_away(directory, made)
        raise
    with _writable(directory, made):
        config.save(directory.run_json)
    try:
        yield
    except BaseException:
        if not directory.jobs.exists() and not any(directory.logs.glob("rank_*.log")):
            _take_away(directory, made)
        raise


@contextmanager
def _writable(directory: RunDirectory, made: list[Path]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if directory.path in made:
            _take_away(directory, made)
        raise LaunchError(
            f"{directory.path} cannot be written: {error.strerror or error}; free space or choose another folder with "
            "--save or --run_dir"
        ) from error


def _take_away(directory: RunDirectory, made: list[Path]) -> None:
    """Removes what this launch made, but keeps folders that others have since filled."""
    if directory.path in made:
        import shutil

        shutil.rmtree(directory.path, ignore_errors=True)
    else:
        for path in (directory.run_json, directory.script):
            path.unlink(missing_ok=True)
    for path in made[1:]:
        try:
            path.rmdir()
        except OSError:
            return


def _require_same(existing: RunConfig, config: RunConfig) -> None:
    if changed := differences(existing, config):
        raise ConfigError(
            f"{config.run_dir} holds another run (it differs in {', '.join(changed)}); choose another --run_dir, or "
            f"resume that run: megabatch resume {shlex.quote(config.run_dir)}"
        )


def differences(existing: RunConfig, config: RunConfig) -> list[str]:
    """Names of the fields in which two runs differ; their provenance does not count."""
    changed = [
        f"{group}.{name}" if name else group
        for group in existing.recipe.__slots__
        for name in _differing(getattr(existing.recipe, group), getattr(config.recipe, group))
    ]
    return changed if existing.shape == config.shape else [*changed, "the model's shape"]


def _differing(old: Any, new: Any) -> list[str]:
    """Names of the fields that differ between two groups; an empty name if a plain value differs."""
    if old == new:
        return []
    names = getattr(old, "__slots__", ())
    return [name for name in names if getattr(old, name) != getattr(new, name)] or [""]


def provenance(launch: Launch, arguments: Sequence[str]) -> dict[str, Any]:
    """Where a run comes from, including its flags; rules keep secrets out of them."""
    import platform
    import socket
    from importlib.metadata import PackageNotFoundError, version

    try:
        megabatch = version("megabatch")
    except PackageNotFoundError:
        megabatch = "checkout"
    return {
        "id": new_id(),
        "megabatch": megabatch,
        "python": platform.python_version(),
        "recipe_file": str(launch.recipe_file),
        "arguments": list(arguments),
        "commit": _commit(launch.recipe_file.parent),
        "model": launch.recipe.model.model,
        "cluster": launch.cluster,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": _user(),
        "host": socket.gethostname(),
        "working_directory": os.getcwd(),
    }


def new_id() -> str:
    """What tells a run from every other, for its checkpoints (`saved.history.id_of`)."""
    return os.urandom(8).hex()


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return str(os.getuid())


def _commit(folder: Path) -> str | None:
    """The commit that the recipe's folder is at, with `+changes` when files differ from it; None outside git."""

    import subprocess

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return f"{commit}+changes" if changes else commit
