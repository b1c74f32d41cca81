"""`chain.json`: the record of a chain beside its steps' folders, and the state of each step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabatch.chain.declare import Chain, Command, Edge, Step
from megabatch.chain.graph import Fate, in_order, may_start
from megabatch.chain.ready import ReadyChain
from megabatch.chain.step import ReadyStep
from megabatch.config.recipe import Recipe
from megabatch.entry.launch import written
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.run_directory import write_atomic
from megabatch.slurm.queue import State
from megabatch.slurm.state import RunStatus, status
from megabatch.values import dataclass

FILE = "chain.json"


@dataclass(frozen=True, slots=True)
class StepState:
    """What we know about a step."""

    step: Step
    status: RunStatus
    fate: Fate | None
    """None while it may still run."""


def write_record(ready: ReadyChain) -> None:
    """Replaces `chain.json`."""
    steps = [
        {
            "name": one.step.name,
            "kind": one.kind,
            "after": [[edge.kind, edge.step] for edge in one.step.after],
            "links": one.step.links,
            "definition": definition(one),
        }
        for one in ready.steps
    ]
    whole = {"name": ready.chain.name, "file": str(ready.file), "cluster": ready.cluster, "steps": steps}
    ready.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(ready.folder / FILE, json.dumps(whole, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Raises: LaunchError when the folder holds no chain."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LaunchError(f"{folder} holds no chain: there is no {FILE}") from error
    except (OSError, ValueError) as error:
        raise LaunchError(f"{folder / FILE} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise LaunchError(f"{folder / FILE} is not the record of a chain")
    return found


def recorded_chain(folder: Path) -> Chain:
    """The graph of a folder's chain; its steps have no content. Raises: LaunchError."""
    found = read_record(folder)
    steps = [
        Step(one["name"], Command(()), tuple(Edge(kind, name) for kind, name in one["after"]), one["links"])
        for one in found["steps"]
    ]
    return Chain(name=found["name"], steps=steps)


def definition(ready: ReadyStep) -> Any:
    """The work of a step that does not train, as JSON; a training run has run.json."""
    if isinstance(ready.work, Recipe):
        return None
    plain = dataclasses.asdict(ready.work)
    plain.pop("resources")
    return json.loads(json.dumps(plain))


def states(chain: Chain, folder: Path) -> list[StepState]:
    """The state of each step, in order; asks Slurm once for all of them."""
    steps = in_order(chain)
    found = status([folder / step.name for step in steps], fresh_s=0)
    fates: dict[str, Fate] = {}
    known = []
    for step, now in zip(steps, found, strict=True):
        fate = _fate(step, now, fates)
        if fate is not None:
            fates[step.name] = fate
        known.append(StepState(step, now, fate))
    return known


def _fate(step: Step, now: RunStatus, fates: Mapping[str, Fate]) -> Fate | None:
    if now.state is State.COMPLETED:
        return "done"
    started = bool(now.jobs) and bool(now.jobs[-1].starts or now.jobs[-1].endings)
    if now.state.active:
        return None
    if started and now.state is not State.NOT_SUBMITTED:
        return "failed"
    if may_start(step, fates) is False:
        return "never"
    return None if now.state is State.NOT_SUBMITTED else "failed"


def to_run(ready: ReadyChain) -> list[ReadyStep]:
    """Missing and failed steps and their dependents, in order, without steps that can never start.

    Raises: ConfigError for a finished step whose declaration changed, LaunchError for a queued step that would have
    to run again, or whose job is about to end: its dependents could never start.
    """
    now = {state.step.name: state for state in states(ready.chain, ready.folder)}
    _require_unchanged(ready, now)
    fates: dict[str, Fate] = {}
    again: list[ReadyStep] = []
    for one in ready.steps:
        state, name = now[one.step.name], one.step.name
        waits_for_new = {edge.step for edge in one.step.after} & {other.step.name for other in again}
        if may_start(one.step, fates) is False:
            fates[name] = "never"
        elif state.status.state.active:
            job = f"job {state.status.job_id}"
            if state.status.state is State.RUNNING and state.status.reason:
                raise LaunchError(f"{name}: {job} is {state.status.reason}; submit the chain again once it has ended")
            if waits_for_new:
                raise LaunchError(
                    f"{name} is {state.status.state} as job {state.status.job_id} and waits for {min(waits_for_new)}, "
                    f"which must run again; run first: megabatch cancel {state.status.run}"
                )
        elif state.fate == "done" and not waits_for_new:
            fates[name] = "done"
        else:
            again.append(one)
    return again


def _require_unchanged(ready: ReadyChain, now: Mapping[str, StepState]) -> None:
    if not (ready.folder / FILE).exists():
        return
    before = {one["name"]: one for one in read_record(ready.folder)["steps"]}
    faults = []
    for one in ready.steps:
        old, state = before.get(one.step.name), now[one.step.name]
        made = state.fate == "done" or state.status.state.active
        if made and one.launch is not None and one.job.files.run_json.exists():
            with written(one.launch, []):
                pass  # reports what differs
        if made and old is not None and old["definition"] != definition(one):
            changed = [k for k, v in (definition(one) or {}).items() if (old["definition"] or {}).get(k) != v]
            rule = f"is {state.status.state} already, but is now declared differently; choose another --run_dir"
            faults.append(Fault(f"{one.step.name}: {', '.join(changed) or 'its work'}", None, rule, bare=True))
    if faults:
        raise ConfigError(faults)
