"""The graph of a chain: its faults, its order, and what will become of steps that have not run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Literal

from megabatch.chain.declare import Chain, Command, Convert, Edge, Step
from megabatch.chain.outputs import Reference, references
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault

Fate = Literal["done", "failed", "never"]
"""How a step ended: success, failure, or never started because its conditions can no longer be met."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def graph_faults(chain: Chain) -> list[Fault]:
    """All faults of names, edges and references, but not the steps' own."""
    if not isinstance(chain.name, str) or not _NAME.fullmatch(chain.name):
        rule = "must be letters, digits, '.', '-' and '_', and begin with a letter or digit"
        return [Fault("chain.name", chain.name, rule)]
    if not chain.steps or not all(isinstance(step, Step) for step in chain.steps):
        return [Fault("chain.steps", None, "must consist of at least one Step(…)", bare=True)]
    found = [*_names(chain), *_edges(chain)]
    if not found:
        found += _cycles(chain)
    if not found:
        found += [fault for step in chain.steps for fault in (*_references(chain, step), *_links(chain, step))]
    return found


def in_order(chain: Chain) -> list[Step]:
    """The steps of a chain without cycles, each after its dependencies, otherwise in the order of declaration."""
    done: dict[str, Step] = {}
    left = list(chain.steps)
    while left:
        step = next(step for step in left if all(edge.step in done for edge in _waits(step)))
        left.remove(step)
        done[step.name] = step
    return list(done.values())


def descendants(chain: Chain, names: set[str]) -> set[str]:
    """`names` and every step that waits for one of them, directly or not."""
    found = set(names)
    for step in in_order(chain):
        if any(edge.step in found for edge in _waits(step)):
            found.add(step.name)
    return found


def may_start(step: Step, fates: Mapping[str, Fate]) -> bool | None:
    """Whether its conditions are met, by Slurm's own rules; None while that is undecided.

    For its dependents, a step that never runs counts as failed.
    """
    answers = [_holds(edge, fates.get(edge.step)) for edge in _waits(step)]
    if False in answers:
        return False
    return None if None in answers else True


def _holds(edge: Edge, fate: Fate | None) -> bool | None:
    if fate is None:
        return None
    return edge.kind == "any" or (fate == "done") == (edge.kind == "ok")


def _waits(step: Step) -> list[Edge]:
    return [edge for edge in step.after if edge.kind != "singleton"]


def _names(chain: Chain) -> Iterator[Fault]:
    names = [step.name for step in chain.steps]
    for name in dict.fromkeys(names):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            rule = "must be letters, digits, '.', '-' and '_', and begin with a letter or digit"
            yield Fault("step.name", name, rule)
        elif names.count(name) > 1:
            yield Fault("step.name", name, f"is the name of {names.count(name)} steps; each needs its own")


def _edges(chain: Chain) -> Iterator[Fault]:
    names = [step.name for step in chain.steps]
    for step in chain.steps:
        place = f"{step.name}.after"
        if not isinstance(step.after, list | tuple) or not all(isinstance(edge, Edge) for edge in step.after):
            yield Fault(place, step.after, "must consist of ok(…), notok(…), ended(…) and singleton()")
            continue
        waits = [edge.step for edge in _waits(step)]
        for name in waits:
            if name not in names:
                yield Fault(place, name, "is not a step of this chain", try_=get_close_matches(name, names, n=2))
        for name in {name for name in waits if waits.count(name) > 1}:
            yield Fault(place, name, "is named twice; give one condition for it")


def _cycles(chain: Chain) -> Iterator[Fault]:
    waits = {step.name: [edge.step for edge in _waits(step)] for step in chain.steps}
    free: set[str] = set()
    while new := {name for name, before in waits.items() if name not in free and free.issuperset(before)}:
        free |= new
    stuck = [name for name in waits if name not in free]
    if stuck:
        # every stuck step waits for another stuck one, so walking back must reach a step twice
        path = [stuck[0]]
        while path.count(path[-1]) == 1:
            path.append(next(name for name in waits[path[-1]] if name not in free))
        circle = path[path.index(path[-1]) :]
        yield Fault(f"{circle[0]}.after", None, f"is a cycle: {' after '.join(circle)}", bare=True)


def _references(chain: Chain, step: Step) -> Iterator[Fault]:
    steps = {other.name: other for other in chain.steps}
    certain = _certain(chain, step)
    for ref in references(step.work):
        place = f"{step.name}: output({ref.step!r})"
        if ref.step not in steps:
            near = get_close_matches(ref.step, steps, n=2)
            yield Fault(place, None, "is not a step of this chain", try_=near, bare=True)
        elif ref.step == step.name:
            yield Fault(place, None, "is its own output", bare=True)
        elif problem := not_made(steps[ref.step], ref):
            yield Fault(place, None, problem, bare=True)
        elif ref.step not in certain:
            rule = f"is read, but {step.name} may start without it: an unbroken path of ok(…) must lead to it"
            yield Fault(place, None, rule, try_=(f"after=ok({ref.step!r})",), bare=True)


def not_made(step: Step, ref: Reference) -> str | None:
    """Why a step does not make the referenced output; None if it does."""
    work, what = step.work, ref.what
    if what == "folder":
        return None
    if isinstance(work, Recipe):
        if what.startswith("file "):
            return f"is a training run and makes no {what}; it makes hf, mcore and checkpoint"
        if what == "hf" and not work.checkpoint.save_safetensors:
            return "makes no hf: its checkpoint.save_safetensors is False"
        return None
    if isinstance(work, Convert):
        makes = "mcore" if work.request.to_mcore else "hf"
        return None if what == makes else f"is a conversion that makes {makes}, not {what}"
    assert isinstance(work, Command)
    if what.removeprefix("file ") in work.outputs:
        return None
    listed = f"; it declares {', '.join(work.outputs)}" if work.outputs else "; it declares no outputs"
    return f"is a command that does not make {what}{listed}"


def _certain(chain: Chain, step: Step) -> set[str]:
    """The steps that have certainly succeeded when this one starts."""
    steps = {other.name: other for other in chain.steps}
    found: set[str] = set()
    todo = [step]
    while todo:
        for edge in _waits(todo.pop()):
            if edge.kind == "ok" and edge.step not in found:
                found.add(edge.step)
                todo.append(steps[edge.step])
    return found


def _links(chain: Chain, step: Step) -> Iterator[Fault]:
    if step.links < 1:
        yield Fault(f"{step.name}.links", step.links, "must be at least 1")
    if step.links > 1 and not isinstance(step.work, Recipe):
        yield Fault(f"{step.name}.links", step.links, "is for training runs, which resume where they stopped")
    several = {other.name: other.links for other in chain.steps if other.links > 1}
    linked = [edge.step for edge in step.after if edge.kind == "ok" and edge.step in several]
    if linked and (len(step.after) > 1 or step.links > 1):
        rule = (
            f"waits for {linked[0]}, which has {several[linked[0]]} links: Slurm cannot make it wait for anything else"
        )
        fix = "a step in between that waits only for it, or links=1"
        yield Fault(f"{step.name}.after", None, rule, try_=(fix,), bare=True)
