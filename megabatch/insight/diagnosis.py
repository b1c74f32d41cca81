"""Why a run failed: the rank that failed first and its node, the class of the failure, what to do, and the evidence.

What is believed, in this order: the mark of the rank that failed first, exit codes, the batch script's last word,
Slurm's state, and what the logs say. One thing goes before all of them: a rank whose log names a cause is blamed, not
one that says only that a peer has gone, whichever was noticed first.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.insight.causes import DEATHS, Cause
from megabatch.insight.evidence import Finding, Mark, findings, foremost, read_mark
from megabatch.insight.goodput import Stay
from megabatch.insight.overview import bad_nodes_of, history, run_json
from megabatch.insight.tails import tail
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.bad_nodes import BadNode
from megabatch.slurm.logs import rank_logs
from megabatch.slurm.nodelist import node_names
from megabatch.slurm.queue import State
from megabatch.slurm.state import RunStatus, status

SHOWN_LINES = 15
_BY_STATE = {
    State.OUT_OF_MEMORY: "oom_host",
    State.TIMEOUT: "time_limit",
    State.NODE_FAIL: "node_failure",
    State.PREEMPTED: "preemption",
    State.CANCELLED: "cancelled",
    State.LOST: "lost",
}
_BY_LAUNCHER = {"hardware", "oom_host", "hung", "time_limit", "node_failure", "preemption"}
"""What Slurm or the batch script knows better than an exception in a rank's log."""
_NODE = re.compile(
    r"Node failure on ([\w.-]+)|\*\*\* \w+ \S+ ON ([\w.-]+) CANCELLED .* DUE TO NODE FAILURE"
    r"|megabatch: preflight: not started on ([^\s,;]+)"
)
_HANGING = re.compile(r"megabatch: the run hangs; rank (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What is known of a failure."""

    run: Path
    state: State
    job_id: str | None = None
    restart: int | None = None
    """Number of the start that failed."""
    cause: Cause | None = None
    """None when nothing failed."""
    rank: int | None = None
    """The rank to look at; None when it is not one rank's failure."""
    node: str | None = None
    exit_code: int | None = None
    evidence: str = ""
    """The line that names the cause, or the reason for the verdict."""
    log: Path | None = None
    line: int | None = None
    """Of the evidence in `log`, 1 first; None where it is not from a log, or lies in a very long one."""
    followers: tuple[int, ...] = ()
    """Ranks that were taken along: their logs say only that a peer was gone."""
    last_lines: tuple[str, ...] = ()
    """Of `log`."""
    bad_nodes: tuple[BadNode, ...] = ()
    """What the job's preflight found."""

    def plain(self) -> dict[str, object]:
        """For JSON: the keys that docs/knowing.md lists."""
        cause = self.cause
        return {
            "run": str(self.run),
            "state": self.state.value,
            "job_id": self.job_id,
            "restart": self.restart,
            "class": cause.name if cause else None,
            "title": cause.title if cause else None,
            "fix": cause.fix if cause else None,
            "rank": self.rank,
            "node": self.node,
            "exit_code": self.exit_code,
            "evidence": self.evidence,
            "log": str(self.log) if self.log else None,
            "line": self.line,
            "followers": list(self.followers),
            "last_lines": list(self.last_lines),
            "bad_nodes": [bad.plain() for bad in self.bad_nodes],
        }


def diagnose(run: Path, *, restart: int | None = None) -> Diagnosis:
    """Why the run failed: its newest start that did, or the one with that number.

    Raises: LaunchError when there is no such start.
    """
    found = status([run])[0]
    held = history(found)
    stay = _failed_start(found, held, restart=restart)
    base = _with_bad_nodes(Diagnosis(run=run, state=found.state, job_id=found.job_id))
    if found.state is State.PENDING and found.reason.startswith("Dependency") and restart is None:
        return replace(base, cause=DEATHS["dependency"], evidence=f"Slurm says: {found.reason}")
    if stay is None:
        return _without_start(base, found)
    base = _with_bad_nodes(replace(base, job_id=stay.job_id, restart=stay.restart, exit_code=stay.exit_code))
    return _of_start(base, found, stay, newest=bool(held) and stay is held[-1])


def _with_bad_nodes(base: Diagnosis) -> Diagnosis:
    return replace(base, bad_nodes=bad_nodes_of(RunDirectory(base.run), base.job_id))


def _failed_start(found: RunStatus, held: Sequence[Stay], *, restart: int | None) -> Stay | None:
    if restart is not None:
        chosen = [stay for stay in held if stay.restart == restart]
        if not chosen:
            raise LaunchError(f"{found.run}: no start {restart}; there are {', '.join(str(s.restart) for s in held)}")
        return chosen[-1]
    if found.state is State.COMPLETED:
        return None
    ended = held[:-1] if found.state is State.RUNNING else held
    failed = [stay for stay in ended if stay.exit_code not in (ExitCode.DONE, ExitCode.REQUEUE)]
    return failed[-1] if failed else None


def _without_start(base: Diagnosis, found: RunStatus) -> Diagnosis:
    """A run of which no start is known to have failed."""
    name = _BY_STATE.get(found.state)
    if found.state is State.FAILED and found.exit_code not in (None, ExitCode.DONE, ExitCode.REQUEUE):
        name = "unknown"
    if name is None:
        return base
    finding = foremost(findings(_batch_logs(base)))
    cause = finding.cause if finding and name == "unknown" else DEATHS[name]
    reason = found.reason or f"Slurm's state is {found.state}"
    result = replace(base, cause=cause, exit_code=found.exit_code or None, evidence=reason)
    return _with_node(_with_log(result, finding))


def _of_start(base: Diagnosis, found: RunStatus, stay: Stay, *, newest: bool) -> Diagnosis:
    run = RunDirectory(base.run)
    mark = read_mark(run, stay.job_id, stay.restart)
    logs = {log.rank: log.path for log in rank_logs(base.run) if log.restart == stay.restart}
    found_in_ranks = list(findings(logs.items()))
    blamed = _blamed(found_in_ranks, mark)
    by_state = DEATHS.get(_BY_STATE.get(found.state, "") if newest else "")
    followers = _followers(found_in_ranks, blamed)
    batch = foremost(findings(_batch_logs(base), since=stay.start))
    root = None if blamed is None or blamed.cause.consequence else blamed
    if root is not None and root.cause.name == "exception" and batch is not None and batch.cause.name in _BY_LAUNCHER:
        root = None
    if root is not None:
        result = _with_log(replace(base, cause=root.cause, rank=root.rank), root)
    elif batch is not None and not batch.cause.consequence and (by_state is None or batch.cause.name != "exception"):
        hanging = _HANGING.search(batch.text)
        rank = int(hanging[1]) if hanging else mark.rank if mark else None
        result = _with_log(replace(base, cause=batch.cause, rank=rank), batch)
    elif by_state is not None:
        result = replace(base, cause=by_state, evidence=found.reason or f"Slurm's state is {found.state}")
    else:
        result = _by_exit_code(base, mark, blamed)
    return _completed(replace(result, followers=followers), run, mark, logs, nodes=stay.nodes)


def _followers(found: Sequence[Finding], blamed: Finding | None) -> tuple[int, ...]:
    ranks = (one.rank for one in found if one.cause.consequence and one is not blamed)
    return tuple(sorted(rank for rank in ranks if rank is not None))


def _blamed(found: Sequence[Finding], mark: Mark | None) -> Finding | None:
    """The rank to blame by what the logs say: the marked one if its log names a cause, else whose does."""
    first = next((f for f in found if mark is not None and f.rank == mark.rank), None)
    if first is not None and not first.cause.consequence:
        return first
    best = foremost(found)
    if mark is not None and ExitCode.of_signal(mark.exit_code) and best is not None and best.cause.name == "exception":
        return first  # killed without a word: what the others met came of that
    return best


def _by_exit_code(base: Diagnosis, mark: Mark | None, blamed: Finding | None) -> Diagnosis:
    """A start whose logs name no cause."""
    code = mark.exit_code if mark else base.exit_code
    if code is not None and ExitCode.of_signal(code) and mark is not None:
        return replace(base, cause=DEATHS["killed"], rank=mark.rank, evidence=f"exit code {code}: signal {code - 128}")
    if code in (ExitCode.HUNG, ExitCode.CONFIG):
        name = "hung" if code == ExitCode.HUNG else "config"
        return replace(base, cause=DEATHS[name], rank=mark.rank if mark else None, evidence=f"exit code {code}")
    if blamed is not None:
        return _with_log(replace(base, cause=blamed.cause, rank=mark.rank if mark else blamed.rank), blamed)
    said = "it left no word: killed from outside, or its node died" if code is None else f"exit code {code}"
    return replace(base, cause=DEATHS["lost" if code is None else "unknown"], evidence=said)


def _completed(
    result: Diagnosis, run: RunDirectory, mark: Mark | None, logs: dict[int, Path], *, nodes: str
) -> Diagnosis:
    """With the node of the blamed rank, its exit code where it is known, and the end of its log."""
    rank = result.rank
    own = mark is not None and rank == mark.rank
    result = _with_node(result)
    node = mark.node if mark is not None and own else _node_of(rank, run, nodes) or result.node
    log = logs.get(rank) if rank is not None and rank in logs else result.log
    if log is None and logs:
        log = logs[min(logs)]
    line = result.line if log == result.log else None
    code = mark.exit_code if mark is not None and own else result.exit_code
    lines = _lines(log)[-SHOWN_LINES:] if log is not None else []
    return replace(result, node=node, exit_code=code, log=log, line=line, last_lines=tuple(lines))


def _node_of(rank: int | None, run: RunDirectory, nodes: str) -> str | None:
    """Ranks fill one node after the other."""
    names, per_node = node_names(nodes), _ranks_per_node(run)
    if rank is None or not names:
        return None
    index = rank // per_node if per_node else 0
    return names[index] if index < len(names) else names[0] if len(names) == 1 else None


def _ranks_per_node(run: RunDirectory) -> int:
    config = run_json(run.path)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return int(config["layout"]["world_size"]) // int(config["recipe"]["resources"]["nodes"])
    return 0


def _with_node(result: Diagnosis) -> Diagnosis:
    """With the node that Slurm or the preflight names as failed."""
    failed = _NODE.search(result.evidence)
    return replace(result, node=failed[1] or failed[2] or failed[3]) if failed else result


def _with_log(result: Diagnosis, finding: Finding | None) -> Diagnosis:
    if finding is None:
        return result
    evidence = finding.text if result.cause is finding.cause else result.evidence
    lines = tuple(_lines(finding.log)[-SHOWN_LINES:])
    return replace(result, evidence=evidence, log=finding.log, line=finding.line, last_lines=lines)


def _batch_logs(base: Diagnosis) -> list[tuple[None, Path]]:
    """The batch script's log of that job; it holds all of the job's starts, so that its end is what counts."""
    path = RunDirectory(base.run).logs / f"batch.{base.job_id}.log"
    return [(None, path)] if path.is_file() else []


def _lines(path: Path) -> list[str]:
    return tail(path, 2**16).decode(errors="replace").splitlines()
