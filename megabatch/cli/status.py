"""`megabatch status`: one line per run, once or until q is pressed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.runs import all_runs
from megabatch.errors import LaunchError
from megabatch.insight.overview import Overview, overview
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.bad_nodes import describe
from megabatch.slurm.queue import State
from megabatch.slurm.records import LOCAL
from megabatch.slurm.script.links import is_linked
from megabatch.slurm.state import RunStatus
from megabatch.table import amount, duration, table, terminal_width

_HEADER = ("RUN", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "GOODPUT", "JOB", "HEARD", "WHY")
REDRAW_S = 2.0


def show_status(paths: Sequence[Path], *, as_json: bool, watch: bool = False) -> int:
    """Prints the state of the runs at or beneath the paths. Raises: LaunchError for a path without a run."""
    if watch:
        return _watch(paths)
    found = overview(all_runs(paths))
    print(json.dumps([one.plain() for one in found], indent=2) if as_json else status_table(found))
    return 0


def status_table(found: Sequence[Overview]) -> str:
    """At most as wide as the terminal."""
    if not found:
        return "no runs in megatron_output; name their folder: megabatch status DIR"
    return table(_HEADER, [_row(one) for one in found], width=terminal_width())


def _watch(paths: Sequence[Path]) -> int:
    from megabatch.cli.screen import Screen

    if not sys.stdout.isatty():
        raise LaunchError("--watch needs a terminal, and standard output is not one; leave --watch out")
    with Screen() as screen:
        while True:
            text = status_table(overview(all_runs(paths)))
            screen.draw(f"{time.strftime('%H:%M:%S')}   q quits\n\n{text}")
            if screen.key_within(REDRAW_S) in ("q", "Q", "\x03", "\x04"):
                return 0


def _ending(exit_code: int | None) -> str:
    saved = " (saved)" if exit_code == ExitCode.REQUEUE else ""
    return f"exit code {exit_code}{saved}" if exit_code else ""


def _row(one: Overview) -> tuple[str, ...]:
    now = one.status
    job = now.job_id or "-"
    if now.attempt:
        job += f" #{now.attempt}"
    reason = _goes_on(now) or now.reason or _ending(now.exit_code)
    why = "; ".join(
        text for text in (reason, describe(one.bad_nodes), *(note.describe() for note in one.damaged)) if text
    )
    return (
        _short(now.run),
        now.state.value,
        "-" if one.step is None else f"{one.step}/{one.train_iters or '?'}",
        "-" if one.loss is None else f"{one.loss:.4f}",
        "-" if one.tokens_per_s is None else amount(one.tokens_per_s),
        "-" if one.eta_s is None else duration(one.eta_s),
        "-" if one.goodput is None else f"{one.goodput:.0%}",
        job,
        "-" if now.heartbeat_age_s in (None, float("inf")) else duration(max(0.0, now.heartbeat_age_s or 0.0)),
        why,
    )


def _goes_on(now: RunStatus) -> str:
    """How to continue a run that stopped with everything saved and has no further job."""
    if now.state is not State.STOPPED or not now.jobs or now.jobs[-1].job_id == LOCAL:
        return ""
    try:
        several = is_linked(RunDirectory(now.run).script.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return f"saved; megabatch resume{' --chain N' * several} goes on"


def _short(run: Path) -> str:
    """Relative to the current folder if it lies beneath it."""
    try:
        return str(run.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(run)
