"""The command line of a chain file: actions, and parameters of its training steps, `--<step>.<parameter>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches

from megabatch.chain.declare import Chain, Step
from megabatch.config.declare import group_types
from megabatch.config.flags import Actions, Named, named, parse
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError, Fault

_ACTIONS = ("submit", "local", "dry_run", "cluster", "run_dir")
_OF_RECIPES = {field.name for field in fields(Actions)}
_NOTHING = Recipe(name="chain", task="sft")

Flags = list[tuple[str, list[str]]]
"""Each flag without its dashes, with the words that follow it."""


def parsed(chain: Chain, arguments: Sequence[str]) -> tuple[Actions, Chain]:
    """Actions, and the chain with its training steps' flags (`--train.lr 1e-5`) in place of their own values.

    Raises: ConfigError with every fault, naming the nearest steps and parameters.
    """
    training = [step.name for step in chain.steps if isinstance(step.work, Recipe)]
    names = sorted((step.name for step in chain.steps), key=len, reverse=True)
    faults: list[Fault] = []
    own: list[str] = []
    of_steps: dict[str, list[str]] = {name: [] for name in training}
    for flag, words in _flags(arguments):
        step = next((name for name in names if flag.startswith(f"{name}.")), None)
        name = flag.partition("=")[0]
        if step in of_steps:
            of_steps[step] += [f"--{flag.removeprefix(f'{step}.')}", *words]
        elif step is not None:
            faults.append(
                Fault(f"--{name}", None, "names a step that takes no flags: only training steps do", bare=True)
            )
        elif not flag or name.replace("-", "_") in _OF_RECIPES:
            own += [*([f"--{flag}"] if flag else []), *words]
        else:
            faults.append(_of_no_step(name, training))
    actions = _actions(own, faults)
    steps = [_changed(step, of_steps.get(step.name, []), faults) for step in chain.steps]
    if faults:
        raise ConfigError(faults)
    return actions, replace(chain, steps=steps)


def _flags(arguments: Sequence[str]) -> Flags:
    """Words before the first flag go under an empty name."""
    found: Flags = []
    for word in arguments:
        if word.startswith("--"):
            found.append((word.removeprefix("--"), []))
        else:
            found = found or [("", [])]
            found[-1][1].append(word)
    return found


def _of_no_step(name: str, training: Sequence[str]) -> Fault:
    """The fault of a flag that names no step."""
    first, dot, rest = name.partition(".")
    if dot and first not in group_types(Recipe):
        near = [f"--{step}.{rest}" for step in get_close_matches(first, training, n=2)]
        hint = f"; the training steps are {', '.join(training)}" if training and not near else ""
        return Fault(f"--{name}", None, f"names no step of this chain{hint}", try_=near, bare=True)
    found = named(name, _NOTHING)
    if isinstance(found, Named) or name in ("name", "task"):
        fix = [f"--{step}.{name}" for step in training]
        return Fault(f"--{name}", None, "needs the name of a training step", try_=fix, bare=True)
    return replace(found, try_=[one for near in found.try_ for one in _spelled(near, training)])


def _spelled(near: str, training: Sequence[str]) -> list[str]:
    """Spells the name of a recipe's flag as a chain's flag."""
    name = near.removeprefix("--")
    if name in _OF_RECIPES:
        return [near] if name in _ACTIONS else []
    return [f"--{step}.{name}" for step in training]


def _actions(own: Sequence[str], faults: list[Fault]) -> Actions:
    try:
        actions, _ = parse(own, _NOTHING)
    except ConfigError as error:
        faults += error.faults
        return Actions()
    for field in fields(Actions):
        if field.name not in _ACTIONS and getattr(actions, field.name) != field.default:
            rule = "is for a single recipe" + ("; here a Step has links=…" if field.name == "chain" else "")
            faults.append(Fault(f"--{field.name}", None, rule, bare=True))
    given = [f"--{name}" for name in ("submit", "local", "dry_run") if getattr(actions, name)]
    if len(given) > 1:
        faults.append(Fault(" and ".join(given), None, "exclude each other; give one of them", bare=True))
    return actions


def _changed(step: Step, words: Sequence[str], faults: list[Fault]) -> Step:
    """The step with these flags of its recipe."""
    if not isinstance(step.work, Recipe) or not words:
        return step
    try:
        asked, work = parse(words, step.work)
    except ConfigError as error:
        faults += [_named(step.name, fault) for fault in error.faults]
        return step
    if asked != Actions():
        faults.append(Fault(f"--{step.name}.…", None, "takes parameters, not actions", bare=True))
    return replace(step, work=work)


def _named(step: str, fault: Fault) -> Fault:
    """A fault of a recipe's flags, as one of this step's."""
    if not fault.field.startswith("--"):
        return replace(fault, field=f"{step}: {fault.field}")
    near = [one for text in fault.try_ if text.removeprefix("--") not in _OF_RECIPES for one in _spelled(text, [step])]
    return replace(fault, field=f"--{step}.{fault.field.removeprefix('--')}", try_=near)
