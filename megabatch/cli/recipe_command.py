"""The command line of a recipe file, which may declare a run, a chain or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from megabatch.chain.declare import Chain
from megabatch.cli.recipe_file import as_declared, file_of, require_start_folder
from megabatch.command_line import run_command
from megabatch.config.flags import Actions, parse
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError, Fault
from megabatch.run_directory import ExitCode
from megabatch.sweep.declare import Sweep


def main(recipe: Callable[[], Recipe | Chain] | Sweep, argv: Sequence[str] | None = None) -> None:
    """Runs a recipe's command line and exits: 0 done, 2 faults of the configuration, else see `ExitCode`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    raise SystemExit(int(run_command(lambda: run(recipe, arguments), arguments)))


def run(recipe: Callable[[], Recipe | Chain] | Sweep, arguments: Sequence[str]) -> int:
    """Exit code of a recipe's command line. Raises: MegabatchError."""
    sweep = recipe if isinstance(recipe, Sweep) else Sweep(recipe)  # type: ignore[arg-type]
    file = file_of(sweep.recipe).absolute()
    require_start_folder(file)
    declared = as_declared(sweep.recipe, file)
    # each of the three has heavy imports that the others do not need
    if isinstance(declared, Chain):
        from megabatch.chain.command import run as run_chain

        return run_chain(declared, arguments, file=file)
    actions, chosen = parse(arguments, declared)
    if actions.help:
        from megabatch.config.help import help_text

        print(help_text(f"python {file.name} [--submit | --local | --dry_run]"))
        return ExitCode.DONE
    _one_action(actions)
    if sweep.declared or actions.sweep:
        from megabatch.sweep.command import run_sweep

        return run_sweep(sweep, chosen, actions, arguments, recipe_file=file)
    if isinstance(recipe, Sweep):
        raise ConfigError([Fault("sweep", None, "has no points: give it grid, zip or list", bare=True)])
    _refuse_sweep_flags(actions)
    from megabatch.entry.command import run_recipe

    return run_recipe(chosen, actions, arguments, recipe_file=file)


def _one_action(actions: Actions) -> None:
    given = [f"--{name}" for name in ("submit", "local", "dry_run") if getattr(actions, name)]
    if len(given) > 1:
        raise ConfigError([Fault(" and ".join(given), None, "exclude each other; give one of them", bare=True)])


def _refuse_sweep_flags(actions: Actions) -> None:
    given = [f"--{name}" for name in ("max_parallel", "keep_all", "gpu") if getattr(actions, name)]
    if given:
        raise ConfigError(
            [Fault(name, None, "has an effect only on a sweep; add --sweep", bare=True) for name in given]
        )
