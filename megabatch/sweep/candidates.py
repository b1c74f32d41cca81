"""The runs of a sweep, each prepared and judged: kept, or pruned with a reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megabatch.config.flags import Actions
from megabatch.config.layout import layout_of
from megabatch.config.recipe import Recipe
from megabatch.config.rules.check import check
from megabatch.config.rules.fields import differing_parameters, unbuilt_fields
from megabatch.config.rules.secrets import no_secrets
from megabatch.config.run import save_folder
from megabatch.entry.estimate import gpu_of, verdict_of
from megabatch.entry.launch import Launch, job_of, prepare
from megabatch.entry.model import FoundModel, find_model
from megabatch.errors import ConfigError, Fault, MegabatchError
from megabatch.plan.estimate import Estimate
from megabatch.plan.gpus import Gpu
from megabatch.run_directory import RunDirectory
from megabatch.slurm.profile import ClusterProfile
from megabatch.sweep.declare import Sweep
from megabatch.sweep.names import value_text
from megabatch.sweep.points import Point, points_of
from megabatch.user_code import in_one_folder
from megabatch.user_error import NO_EXIT, describe_error
from megabatch.values import dataclass

_SHAPES = ("model", "moe", "mla", "mtp", "bridge", "data", "tuner")
"""Groups of the recipe that a model's shape depends on."""
_CACHE = "MEGABATCH_CACHE"
_INPUTS = ("model", "data", "checkpoint", "bridge", "tuner", "rlhf", "gkd", "training", "resources")
"""Groups that name a run's input files, how to read them, or its GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One point, and the decisions about it."""

    point: Point
    launch: Launch
    pruned: str = ""
    """Why it is left out; empty if kept."""
    unbuilt: tuple[Fault, ...] = ()
    """Features that it asks for and we have not built: the table shows them, a real start refuses them."""
    estimate: Estimate | None = None
    """None without GPUs, or without an estimate."""

    @property
    def kept(self) -> bool:
        return not self.pruned


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """A sweep made ready; nothing is on disk yet."""

    name: str
    folder: Path
    """Folder of the run directories, the arrays and `sweep.json`."""
    base: Launch
    """The recipe itself."""
    all: tuple[Candidate, ...]
    max_parallel: int | None
    parameters: tuple[str, ...]
    """Dotted names of what is swept."""

    gpu: Gpu | None
    """GPU for the estimates; None for a recipe without GPUs."""

    @property
    def kept(self) -> list[Candidate]:
        return [candidate for candidate in self.all if candidate.kept]

    def distinct_inputs(self) -> list[Candidate]:
        """One candidate per distinct set of input files and GPUs among the kept ones."""
        groups = {
            repr([c.point.values[name] for name in c.point.values if name.partition(".")[0] in _INPUTS]): c
            for c in self.kept
        }
        return list(groups.values())


def candidates(sweep: Sweep, recipe: Recipe, actions: Actions, *, recipe_file: Path) -> Candidates:
    """Every point judged. Raises: ConfigError for faults of the declaration, or of the recipe's single values."""
    name = sweep.name or recipe_file.stem
    points = points_of(sweep, recipe, given=actions.sweep)
    base = prepare(recipe, actions, recipe_file=recipe_file)
    # values shared with the faultless recipe need no check per point; `prepare` has checked them
    variant_of = None if any(unbuilt_fields(recipe)) or any(no_secrets(recipe)) else recipe
    given = Path(actions.run_dir).expanduser() if actions.run_dir else save_folder(recipe).expanduser() / name
    models: dict[str, FoundModel] = {}
    gpu = gpu_of(actions.gpu or base.profile.gpu) if recipe.resources.gpus_per_node else None
    return Candidates(
        name=name,
        folder=given.absolute(),
        base=base,
        all=tuple(
            _judged(
                point,
                _launch(point, base, given.absolute() / point.name, models),
                sweep=sweep,
                variant_of=variant_of,
                gpu=gpu,
                keep_all=actions.keep_all,
            )
            for point in points
        ),
        max_parallel=actions.max_parallel or sweep.max_parallel,
        gpu=gpu,
        parameters=tuple(dict.fromkeys(name for point in points for name in point.values)),
    )


def _launch(point: Point, base: Launch, folder: Path, models: dict[str, FoundModel]) -> Launch:
    """The decisions of `prepare`; parts that points share are computed once."""
    recipe, directory = point.recipe, RunDirectory(folder)
    job = job_of(recipe, directory, snapshot=base.job.snapshot)
    key = repr([point.values.get(name) for name in point.values if name.partition(".")[0] in _SHAPES])
    if key not in models:
        models[key] = find_model(recipe, shared_cache=base.profile.shared_cache)
    return replace(
        base,
        recipe=recipe,
        model=models[key],
        layout=layout_of(recipe, models[key].shape),
        directory=directory,
        job=replace(job, environment={**job.environment, **_shared_tokens(folder.parent, base.profile)}),
    )


def _shared_tokens(folder: Path, profile: ClusterProfile) -> dict[str, str]:
    """Makes the runs of a sweep tokenise a dataset only once, unless the profile or the environment sets a cache."""
    said = profile.shared_cache or _CACHE in profile.environment or _CACHE in os.environ
    return {} if said else {_CACHE: str(folder / "cache")}


def _wanted(point: Point, sweep: Sweep, *, file: Path) -> bool:
    """The result of the sweep's own filter. Raises: ConfigError with the point's values if the filter fails."""
    try:
        with in_one_folder(file):
            return sweep.filter is None or bool(sweep.filter(point.recipe))
    except MegabatchError:
        raise
    except (Exception, SystemExit) as error:
        values = ", ".join(f"{name}={value_text(value)}" for name, value in point.values.items())
        said = describe_error(error, file) + (NO_EXIT if isinstance(error, SystemExit) else "")
        rule = f"fails for point {point.name} ({values}): {said}"
        raise ConfigError([Fault("sweep.filter", None, rule, bare=True)]) from error


def _judged(
    point: Point, launch: Launch, *, sweep: Sweep, variant_of: Recipe | None, gpu: Gpu | None, keep_all: bool
) -> Candidate:
    if not _wanted(point, sweep, file=launch.recipe_file):
        return Candidate(point=point, launch=launch, pruned="rejected by the sweep's filter")
    shape = launch.model.shape
    if gpu is not None and shape is not None and launch.model.fault is None:
        verdict = verdict_of(point.recipe, shape, gpu=gpu, variant_of=variant_of)
        if verdict.estimate is not None:
            pruned = "" if keep_all else verdict.reason
            return Candidate(point=point, launch=launch, pruned=pruned, estimate=verdict.estimate)
    among = None if variant_of is None else tuple(differing_parameters(point.recipe, variant_of))
    unbuilt = set(map(str, unbuilt_fields(point.recipe, among=among)))
    faults = check(point.recipe, shape, variant_of=variant_of) + ([launch.model.fault] if launch.model.fault else [])
    broken = [fault for fault in faults if str(fault) not in unbuilt]
    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return Candidate(
        point=point,
        launch=launch,
        pruned=f"{broken[0]}{more}" if broken else "",
        unbuilt=tuple(fault for fault in faults if str(fault) in unbuilt),
    )
