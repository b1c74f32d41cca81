"""A step of a chain that never ran: which earlier step it waited for in vain, by the chain's own record."""

from __future__ import annotations

import json
from pathlib import Path

from megabatch.run_directory import RunDirectory
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.state import status


def unmet_dependency(run: Path) -> str:
    """`Dependency that cannot be met: …` for a step whose newest job never started; otherwise empty."""
    jobs = read_records(RunDirectory(run))
    if not jobs or jobs[-1].starts:
        return ""
    ended = {
        step: one.state for step in _waits_for(run) for one in status([run.parent / step]) if not one.state.active
    }
    unmet = [f"step {step} is {state}" for step, state in ended.items() if state is not State.COMPLETED]
    return f"Dependency that cannot be met: {', '.join(unmet)}" if unmet else ""


def _waits_for(run: Path) -> list[str]:
    """Steps that must succeed before this one, according to `chain.json`."""
    try:
        chain = json.loads((run.parent / "chain.json").read_text(encoding="utf-8"))
        [after] = [step["after"] for step in chain["steps"] if step["name"] == run.name]
        return [str(step) for kind, step in after if kind == "ok"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
