"""`megabatch plan RECIPE.py [flags]`: a recipe's plan with estimates, or all its layouts on some GPUs, ranked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megabatch.cli.estimate_text import estimate_document, estimate_text
from megabatch.cli.layouts_text import layouts_document, layouts_text
from megabatch.cli.recipe_command import main
from megabatch.cli.recipe_file import as_declared, load_declared
from megabatch.command_line import exit_code
from megabatch.config.flags import Actions, parse
from megabatch.config.recipe import Recipe
from megabatch.config.rules.fields import unbuilt_fields
from megabatch.entry.estimate import estimate_of, gpu_of
from megabatch.entry.input_checks import occupied, unwritable
from megabatch.entry.launch import Launch, prepare
from megabatch.entry.launch_checks import missing_here
from megabatch.entry.layouts import faults_of_all, judged_layouts
from megabatch.entry.plan_text import plan_text
from megabatch.errors import ConfigError, Fault, MegabatchError
from megabatch.plan.memory import MARGIN, usable_gib
from megabatch.plan.shape import ModelShape
from megabatch.sweep.declare import Sweep
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The options of `megabatch plan` besides the recipe's own flags."""

    gpu: str | None = None
    """Name of the GPU that estimates are for; None takes the cluster profile's, or an H100."""
    gpus: int | None = None
    """Judges every layout on this many GPUs; None plans the recipe as it is."""
    gpu_memory_gib: float | None = None
    """Memory that a layout may take on each GPU; None takes the GPU's memory less the margin."""
    everything: bool = False
    as_json: bool = False


_NO_LAYOUT = 1
"""Exit code where no layout can run."""


def show_plan(path: Path, flags: Sequence[str], options: PlanOptions | None = None) -> int:
    """Prints the plan; exit code 0, 1 where no layout can run on that many GPUs, or the code that the recipe's own
    command line would return for a fault.

    Sweeps, chains, help and dry runs go to that command line.
    Raises: ConfigError for flags that start something.
    """
    if started := [flag for flag in flags if flag.split("=")[0] in ("--submit", "--local")]:
        rule = f"has no effect on a plan, which starts nothing; use: python {path} {' '.join(flags)}"
        raise ConfigError([Fault(started[0], None, rule, bare=True)])
    found = load_declared(path)
    try:
        if not isinstance(found, Sweep):
            recipe = as_declared(found, path)
            if isinstance(recipe, Recipe):
                actions, chosen = parse(list(flags), recipe)
                if not _does_more(actions):
                    return _show(path, chosen, actions, options or PlanOptions())
    except MegabatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(exit_code(error))
    if _asks_for_help(flags):
        print(_USAGE)
    elif options is not None:
        _require_single(path, options)
    return _own_command_line(found, [*flags, *_gpu_flag(options)])


def _require_single(path: Path, options: PlanOptions) -> None:
    """Raises: ConfigError for options that only the plan of a single recipe has."""
    given = {
        "--gpus": options.gpus,
        "--gpu_memory_gib": options.gpu_memory_gib,
        "--all": options.everything or None,
        "--json": options.as_json or None,
    }
    rule = f"is for the plan of a single recipe, and {path.name} is a chain or a sweep here, or a dry run"
    if faults := [Fault(name, None, rule, bare=True) for name, value in given.items() if value is not None]:
        raise ConfigError(faults)


def _gpu_flag(options: PlanOptions | None) -> list[str]:
    return ["--gpu", options.gpu] if options is not None and options.gpu is not None else []


def show_usage(flags: Sequence[str]) -> int:
    """Of a command line that names no recipe. Raises: ConfigError unless it asks for help."""
    if not _asks_for_help(flags):
        raise ConfigError("megabatch plan needs a recipe: megabatch plan RECIPE.py; see --help")
    print(_USAGE, end="")
    return 0


def _asks_for_help(flags: Sequence[str]) -> bool:
    return any(flag in ("-h", "--help") for flag in flags)


_USAGE = f"""\
megabatch plan RECIPE.py [--gpu NAME] [--gpus N [--gpu_memory_gib GIB] [--all]] [--json] [--<parameter> VALUE …]

  --gpu NAME            GPU for the estimates, such as h100; default: the cluster profile's, or an H100
  --gpus N              rank every layout on that many GPUs instead of planning the recipe's own
  --gpu_memory_gib GIB  memory that a layout may use on each; default: {1 - MARGIN:.0%} of the GPU's
  --all                 list every layout, with the reason for each pruned one
  --json                for programs
"""


def _does_more(actions: Actions) -> bool:
    return bool(actions.help or actions.dry_run or actions.sweep)


def _own_command_line(found: Callable[[], Recipe] | Sweep, flags: Sequence[str]) -> int:
    try:
        main(found, list(flags))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _show(path: Path, recipe: Recipe, actions: Actions, options: PlanOptions) -> int:
    launch = prepare(recipe, actions, recipe_file=path.absolute())
    if options.gpus is not None:
        text, found_one = _layouts(launch, options, gpus=options.gpus)
        print(text)
        if not found_one:
            print(f"error: no layout can run on {options.gpus} GPUs; the reasons are above", file=sys.stderr)
        return 0 if found_one else _NO_LAYOUT
    unbuilt = _faults_but_unbuilt(launch)
    gpu = gpu_of(options.gpu or launch.profile.gpu)
    wanted = launch.model.shape is not None and (recipe.resources.gpus_per_node or options.gpu)
    found = estimate_of(recipe, launch.model.shape, gpu) if wanted and launch.model.shape else None
    if options.as_json:
        if found is None:
            raise ConfigError(_no_estimate(launch))
        print(json.dumps(estimate_document(found, gpu), indent=2))
        return 0
    folder = launch.directory.path
    refusals = [*unbuilt, *missing_here(launch, local=False), *unwritable(folder), *occupied(folder)]
    print(plan_text(launch, refusals=refusals))
    print(f"\n{estimate_text(found, gpu) if found else _no_estimate(launch)}")
    return 0


def _no_estimate(launch: Launch) -> str:
    if launch.model.shape is None:
        return f"no estimate: the model's shape is not known ({launch.model.origin})"
    return "no estimate: the recipe asks for no GPUs (resources.gpus_per_node=0); --gpu h100 estimates it for that GPU"


def _faults_but_unbuilt(launch: Launch) -> list[Fault]:
    """Features that are not built yet can still be planned. Raises: ConfigError for every other fault."""
    unbuilt = list(unbuilt_fields(launch.recipe))
    known = {str(fault) for fault in unbuilt}
    faults = [fault for fault in launch.faults() if str(fault) not in known]
    if faults:
        raise ConfigError(faults)
    return unbuilt


def _layouts(launch: Launch, options: PlanOptions, *, gpus: int) -> tuple[str, bool]:
    """What to print, and whether there is a layout that can run."""
    recipe, shape = launch.recipe, _shape(launch)
    if gpus < 1:
        raise ConfigError([Fault("--gpus", gpus, "must be at least 1")])
    a_node = recipe.resources.gpus_per_node or gpus
    if gpus > a_node and gpus % a_node:
        rule = f"must fill whole nodes of gpus_per_node={a_node}, or be less than one node"
        raise ConfigError([Fault("--gpus", gpus, rule, try_=(gpus // a_node * a_node,))])
    if faults := faults_of_all(recipe, shape, gpus=gpus):
        raise ConfigError(faults)
    gpu = gpu_of(options.gpu or launch.profile.gpu)
    limit = usable_gib(gpu) if options.gpu_memory_gib is None else options.gpu_memory_gib
    if limit <= 0:
        raise ConfigError([Fault("--gpu_memory_gib", limit, "must be above 0")])
    judged = judged_layouts(recipe, shape, gpus=gpus, gpu=gpu, gpu_memory_gib=limit)
    if options.as_json:
        text = json.dumps(layouts_document(judged, gpu), indent=2)
    else:
        text = layouts_text(judged, gpus=gpus, gpu=gpu, limit_gib=limit, everything=options.everything)
    return text, any(one.verdict.keep for one in judged)


def _shape(launch: Launch) -> ModelShape:
    if launch.model.shape is None:
        raise ConfigError(_no_estimate(launch))
    return launch.model.shape
