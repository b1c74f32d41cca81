"""Why a run failed: the rank that failed first and its node, the class of the failure, what to do, and the evidence.

We gather all evidence of one attempt (its ranks' logs, its part of the batch log, the rank that failed first, its
ending, and Slurm's state if it belongs to this attempt) and match it against megabatch.insight.causes.TABLE: the
first row that matches any of it gives the class.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.insight.causes import CAUSES, Cause, Source
from megabatch.insight.dependency import unmet_dependency
from megabatch.insight.evidence import (
    SEARCHED_BYTES,
    Finding,
    FirstFailure,
    first_error,
    of_ending,
    of_ranks,
    of_script,
    of_slurm,
    read_first_failure,
    root_failure,
    search,
    strongest,
)
from megabatch.insight.goodput import Attempt
from megabatch.insight.overview import bad_nodes_of, damaged_of, history, run_json
from megabatch.insight.tail import tail
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.history import SetAside
from megabatch.slurm.bad_nodes import BadNode
from megabatch.slurm.logs import rank_logs
from megabatch.slurm.nodelist import node_names
from megabatch.slurm.queue import SOURCES, State
from megabatch.slurm.state import RunStatus, status
from megabatch.values import dataclass

SHOWN_LINES = 15
_ENDED_WELL = (ExitCode.DONE, ExitCode.REQUEUE)
_NODE = re.compile(
    r"Node failure on ([\w.-]+)|\*\*\* \w+ \S+ ON ([\w.-]+) CANCELLED .* DUE TO NODE FAILURE"
    r"|megabatch: preflight: not started on ([^\s,;]+)|Task launch for \S+ failed on node ([\w.-]+)"
)
_HANGING = re.compile(r"megabatch: the run hangs; rank (\d+)")
_ROLE = re.compile(r"megabatch: role (?P<name>\w+), task (?P<task>\d+)(?: on (?P<node>\S+))? (?P<what>.*)")
_CODE = re.compile(r"exit code (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What we know about a failure."""

    run: Path
    state: State
    job_id: str | None = None
    attempt: int | None = None
    """Number of the attempt that failed."""
    cause: Cause | None = None
    """None when nothing failed."""
    rank: int | None = None
    """The rank to look at; None when the failure is not a single rank's."""
    node: str | None = None
    role: str | None = None
    """The server that failed: `NAME, task N`."""
    exit_code: int | None = None
    evidence: str = ""
    """The line that names the cause, or the reason for the verdict."""
    log: Path | None = None
    line: int | None = None
    """Line number of the evidence in `log`, from 1; None if it is not from a log, or lies in a very long one."""
    followers: tuple[int, ...] = ()
    """Ranks that failed as a consequence: their logs report only a lost peer."""
    last_lines: tuple[str, ...] = ()
    """Of `log`."""
    damaged: tuple[SetAside, ...] = ()
    """Checkpoints that were found damaged and set aside."""
    bad_nodes: tuple[BadNode, ...] = ()
    """What the job's preflight found."""
    outlived: tuple[int, ...] = ()
    """Attempts that failed before one that completed the run."""

    def plain(self) -> dict[str, object]:
        """For JSON: the keys that docs/inspecting.md lists."""
        cause = self.cause
        return {
            "run": str(self.run),
            "state": self.state.value,
            "job_id": self.job_id,
            "attempt": self.attempt,
            "class": cause.name if cause else None,
            "title": cause.title if cause else None,
            "fix": cause.fix if cause else None,
            "rank": self.rank,
            "node": self.node,
            "role": self.role,
            "exit_code": self.exit_code,
            "evidence": self.evidence,
            "log": str(self.log) if self.log else None,
            "line": self.line,
            "followers": list(self.followers),
            "last_lines": list(self.last_lines),
            "bad_nodes": [bad.plain() for bad in self.bad_nodes],
            "damaged": [note.describe() for note in self.damaged],
            "outlived": list(self.outlived),
        }


def diagnose(run: Path, *, attempt: int | None = None) -> Diagnosis:
    """Why the run failed: in its newest failed attempt, or in the attempt with that number.

    Raises: LaunchError when there is no such attempt.
    """
    found = status([run])[0]
    attempts = history(found)
    failed = _failed_attempt(found, attempts, number=attempt)
    base = Diagnosis(run=run, state=found.state, job_id=found.job_id)
    if failed is None:
        if found.state is State.COMPLETED:
            codes = {attempt.number: attempt.exit_code for attempt in attempts}
            base = replace(base, outlived=tuple(n for n, code in codes.items() if code not in (None, *_ENDED_WELL)))
        return _with_notes(_without_attempt(base, found))
    base = replace(base, job_id=failed.job_id, attempt=failed.number, exit_code=failed.exit_code)
    if failed.exit_code in _ENDED_WELL:
        return _with_notes(base)
    return _with_notes(_of_attempt(base, found, failed, newest=failed is attempts[-1]))


def _with_notes(base: Diagnosis) -> Diagnosis:
    run = RunDirectory(base.run)
    return replace(base, bad_nodes=bad_nodes_of(run, base.job_id), damaged=damaged_of(run))


def _failed_attempt(found: RunStatus, attempts: Sequence[Attempt], *, number: int | None) -> Attempt | None:
    if number is not None:
        chosen = [attempt for attempt in attempts if attempt.number == number]
        if not chosen:
            there = ", ".join(str(attempt.number) for attempt in attempts)
            raise LaunchError(f"{found.run}: no attempt {number}; there are {there}")
        return chosen[-1]
    if found.state is State.COMPLETED or not attempts or _ends_its_job_alone(found, attempts[-1]):
        return None
    ended = attempts[:-1] if found.state is State.RUNNING else attempts
    failed = [attempt for attempt in ended if attempt.exit_code not in _ENDED_WELL]
    return failed[-1] if failed else None


def _ends_its_job_alone(found: RunStatus, newest: Attempt) -> bool:
    """Whether the job's state is not about its newest attempt: that one succeeded, or belongs to an earlier job."""
    ended = found.state in (State.CANCELLED, State.FAILED, State.NODE_FAIL, State.TIMEOUT, State.LOST)
    never = found.state is State.PENDING and found.reason.startswith("Dependency")
    return never or (ended and (newest.exit_code in _ENDED_WELL or newest.job_id != found.job_id))


def _without_attempt(base: Diagnosis, found: RunStatus) -> Diagnosis:
    """Diagnoses a run, or its newest job, without a known failed attempt."""
    unmet = unmet_dependency(base.run) if found.state is State.LOST else ""
    evidence = [of_slurm(found.state, unmet or found.reason, shown=unmet or _word_of(found))]
    if found.state is State.FAILED and found.exit_code not in _ENDED_WELL:
        evidence += [of_script(log, None) for log in _script_logs(base)]
        evidence.append(of_ending(found.exit_code))
    finding = strongest(itertools.chain(*evidence), None)
    if finding is None:
        return base
    result = replace(base, cause=finding.cause, exit_code=found.exit_code or None, evidence=finding.text)
    if finding.cause is CAUSES["unknown"] and found.reason:
        result = replace(result, evidence=found.reason)
    return _with_end(result, finding.log, finding.line)


def _of_attempt(base: Diagnosis, found: RunStatus, attempt: Attempt, *, newest: bool) -> Diagnosis:
    run = RunDirectory(base.run)
    logs = {log.rank: log.path for log in rank_logs(base.run) if log.attempt == attempt.number}
    first = root_failure(read_first_failure(run, attempt.job_id, attempt.number), logs)
    of_logs = list(of_ranks(logs, first))
    others = [of_script(log, attempt.number) for log in _script_logs(base)]
    others.append(of_ending(attempt.exit_code))
    # an attempt's own record of its ending counts; Slurm's state may be about something later
    if newest and attempt.job_id == found.job_id and (attempt.exit_code is None or found.state is State.OUT_OF_MEMORY):
        others.append(of_slurm(found.state, found.reason, shown=_word_of(found)))
    finding = strongest(itertools.chain(of_logs, *others), first)
    assert finding is not None, "every ending, or its lack, has a row"
    result = replace(base, cause=finding.cause, evidence=finding.text, followers=_followers(of_logs, finding))
    if role := _ROLE.match(finding.text):
        return _of_role(result, role, finding)
    return _of_rank(result, finding, first, logs, nodes=attempt.nodes)


def _word_of(found: RunStatus) -> str:
    if found.source not in SOURCES:
        return found.reason or f"the run's own records say {found.state}"
    return f"Slurm says: {found.reason or found.state}"


def _script_logs(base: Diagnosis) -> list[Path]:
    """The log of the job's batch script, or of the local launcher."""
    path = RunDirectory(base.run).batch_log(base.job_id or "")
    return [path] if path.is_file() else []


def _followers(found: Iterable[Finding], blamed: Finding) -> tuple[int, ...]:
    ranks = {one.rank for one in found if one.consequence and one.rank != blamed.rank}
    return tuple(sorted(rank for rank in ranks if rank is not None))


def _of_role(result: Diagnosis, role: re.Match[str], finding: Finding) -> Diagnosis:
    """A server's failure: its name, node and log, and the cause found in that log."""
    log = RunDirectory(result.run).logs / f"{role['name']}_{role['task']}.{result.attempt}.log"
    text = tail(log, SEARCHED_BYTES).decode(errors="replace")
    named = search(text, (Source.RANK,))
    said = named[1] if named else first_error(text)
    code = _CODE.search(role["what"])
    result = replace(
        result,
        role=f"{role['name']}, task {role['task']}",
        node=role["node"],
        exit_code=int(code[1]) if code else result.exit_code,
        evidence=f"{finding.text}; its log says: {said}" if said else finding.text,
    )
    return _with_end(result, log, None) if log.is_file() else _with_end(result, finding.log, finding.line)


def _of_rank(
    result: Diagnosis, finding: Finding, first: FirstFailure | None, logs: Mapping[int, Path], *, nodes: str
) -> Diagnosis:
    """Adds the rank to look at, its node, its exit code if known, and the end of its log."""
    rank = _rank_of(finding, first)
    own = first is not None and rank == first.rank
    failed = None if finding.rank is not None else _NODE.search(finding.text)
    known = _node_of(rank, RunDirectory(result.run), nodes)
    marked = first.node if first is not None and own else ""
    node = marked or known or (failed and next(filter(None, failed.groups())))
    code = first.exit_code if first is not None and own else result.exit_code
    log = logs.get(rank) if rank is not None else None
    log = log or finding.log or (logs[min(logs)] if logs else None)
    result = replace(result, rank=rank, node=node or None, exit_code=code)
    return _with_end(result, log, finding.line if log == finding.log else None)


def _rank_of(finding: Finding, first: FirstFailure | None) -> int | None:
    """The rank that failed; events of nodes and jobs belong to no rank."""
    hanging = _HANGING.search(finding.text)
    if hanging:
        return int(hanging[1])
    if finding.rank is not None:
        return finding.rank
    of_all = ("bad_node", "dependency", "time_limit", "node_failure", "preemption", "cancelled", "lost")
    return None if first is None or finding.cause.name in of_all else first.rank


def _node_of(rank: int | None, run: RunDirectory, nodes: str) -> str | None:
    """The rank's node: ranks fill one node after the other."""
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


def _with_end(result: Diagnosis, log: Path | None, line: int | None) -> Diagnosis:
    lines = [] if log is None else tail(log, 2**16).decode(errors="replace").splitlines()[-SHOWN_LINES:]
    return replace(result, log=log, line=line, last_lines=tuple(lines))
