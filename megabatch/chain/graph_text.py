"""A chain's graph as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megabatch.chain.declare import Step
from megabatch.chain.graph import Fate
from megabatch.chain.ready import ReadyChain
from megabatch.chain.record import StepState
from megabatch.chain.step import ReadyStep

_WORDS = {"ok": "ok", "notok": "not ok", "any": "ended", "singleton": "singleton"}


def graph_table(ready: ReadyChain) -> list[tuple[str, ...]]:
    """A header, then a row for each step."""
    header = ("STEP", "KIND", "AFTER", "NODES x TASKS", "TIME", "FOLDER")
    return [header, *(_row(one) for one in ready.steps)]


def _row(one: ReadyStep) -> tuple[str, ...]:
    job = one.job
    links = f" in {job.links} links" if job.links > 1 else ""
    size = f"{job.nodes} x {job.tasks_per_node}" + "".join(
        f" + {r.name} {r.nodes} x {r.tasks_per_node}" for r in job.roles
    )
    return one.step.name, one.kind + links, after_text(one.step), size, job.time or "-", str(job.run_directory)


def after_text(step: Step) -> str:
    """`convert ok, train ended`; `-` for a step that waits for nothing."""
    words = [f"{edge.step} {_WORDS[edge.kind]}".strip() for edge in step.after]
    return ", ".join(words) or "-"


def state_table(states: Sequence[StepState]) -> list[tuple[str, ...]]:
    """A header, then a row for each step: its state, and for one that waits whether it can still run."""
    fates = {one.step.name: one.fate for one in states}
    header = ("STEP", "STATE", "JOB", "AFTER", "WHY")
    return [header, *(_state_row(one, fates) for one in states)]


def _state_row(one: StepState, fates: Mapping[str, Fate | None]) -> tuple[str, ...]:
    now = one.status
    word = "never runs" if one.fate == "never" else now.state.value
    why = f"exit code {now.exit_code}" if now.exit_code else now.reason
    if one.fate == "never":
        broken = [e for e in one.step.after if e.kind != "singleton" and _breaks(e.kind, fates.get(e.step))]
        why = ", ".join(f"{edge.step} {_said(fates[edge.step])}" for edge in broken)
    return one.step.name, word, now.job_id or "-", after_text(one.step), why


def _breaks(kind: str, fate: Fate | None) -> bool:
    return fate is not None and kind != "any" and (fate == "done") != (kind == "ok")


def _said(fate: Fate | None) -> str:
    return {"done": "ended well", "failed": "failed", "never": "never runs"}[str(fate)]
