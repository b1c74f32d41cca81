"""Running a job's ranks on this machine, without Slurm, in the same environment and with the same files."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from megabatch.errors import LaunchError
from megabatch.own_code import PACKAGE
from megabatch.run_directory import ExitCode
from megabatch.slurm import hang
from megabatch.slurm.environment import job_variables
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local_roles import Requests, Servers
from megabatch.slurm.ports import free_port_block
from megabatch.slurm.processes import die_with_parent, end_processes, identity, tagged_processes
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.records import LOCAL, Ending, Start, next_attempt, record_ending, record_start
from megabatch.slurm.script.variables import check_names
from megabatch.values import dataclass

_ENDED_WELL = (ExitCode.DONE, ExitCode.REQUEUE)
_POLL_S = 0.05
_LAST_WORDS_S = 1.0
"""After one rank dies, the others get this time to log why before they are killed."""


def run_local(
    job: JobSpec,
    profile: ClusterProfile | None = None,
    *,
    terminal: BinaryIO | None = None,
    requests: StopRequests | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Runs all `nodes * tasks_per_node` ranks here and returns the worst rank's exit code.

    Rank 0's log is shown on `terminal` (standard output unless given) as it grows. SIGINT and SIGTERM ask the ranks to
    save and stop; a second signal kills them. One dead rank ends the others. No process is left behind, even when
    this one is killed.
    Args: `requests`: stop requests of a caller that runs several jobs in threads; `variables` win over all others.
    Raises: LaunchError when the run directory cannot be written or the command cannot be started.
    """
    tag = f"MEGABATCH_LOCAL_RUN={secrets.token_hex(8)}"
    try:
        job.files.logs.mkdir(parents=True, exist_ok=True)
        attempt = next_attempt(job.files)
        shared = local_environment(job, profile or ClusterProfile()) | dict(variables or {})
        with contextlib.nullcontext(requests) if requests else StopRequests() as asked, _kill_at_end(tag):
            request, failed = (job.files.marker(name, LOCAL, attempt) for name in ("stop", "failed"))
            rank_0 = job.files.rank_log(0, attempt)
            rank_0.touch()
            with open(rank_0, "rb") as log, _removed_at_end(request):
                beat = hang.Watch(job.files.heartbeat, job.hang_timeout_s)
                output = _Output(log, terminal or sys.stdout.buffer, job.files.batch_log(LOCAL))
                output.note(f"attempt {attempt} of job {LOCAL} on {socket.gethostname()}")
                servers = Servers(job, asked, output.say)
                shared |= servers.start(os.environ | shared | dict([tag.split("=", 1)]), attempt=attempt)
                may_start = servers.failed is None and not (job.roles and asked.count)
                ranks = _start(job, shared, attempt=attempt, request=request, tag=tag) if may_start else []
                record_start(job.files, Start(attempt, time.time(), socket.gethostname(), identity(os.getpid())))
                code = _watch(ranks, servers, output, beat, request=request, failed=failed)
                code = servers.stop(code if may_start else ExitCode.REQUEUE)
            record_ending(job.files, Ending(attempt, code, time.time()))
            return code
    except OSError as error:
        raise LaunchError(f"cannot run {job.command[0]} in {job.run_directory}: {error}") from error


def local_environment(job: JobSpec, profile: ClusterProfile) -> dict[str, str]:
    """Variables that all ranks share, besides this process's own environment. Raises: LaunchError as `render` does."""
    world, variables = str(job.world_size), job_variables(job, profile)
    check_names(variables, (*profile.inherit, *job.inherit))
    # the ranks must find an uninstalled checkout as we did
    code = str(PACKAGE.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {
        **{v.name: v.value for v in variables if not v.node_local},
        "PYTHONPATH": os.pathsep.join([code, inherited] if inherited else [code]),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port_block()),
        "MEGABATCH_RUN": str(job.run_directory),
    }


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        """Exit code as a shell gives it (128 + signal); None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def ask_to_stop(self) -> None:
        """Signals only the rank: its data workers have nothing to save."""
        self.process.send_signal(signal.SIGUSR2)

    def ask_where(self) -> None:
        """Makes it write its stacks to its log."""
        self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Kills the rank's whole process group."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Output:
    """Shows rank 0's log on the terminal as it grows, and the launcher's messages, which also go to its own log."""

    log: BinaryIO
    terminal: BinaryIO
    own: Path

    def show(self) -> None:
        if text := self.log.read():
            self.terminal.write(text)
            self.terminal.flush()

    def say(self, text: str) -> None:
        self.note(text)
        self.terminal.write(f"megabatch: {text}\n".encode())
        self.terminal.flush()

    def note(self, text: str) -> None:
        """Logs a message that a batch script would log, for later reading."""
        with open(self.own, "a", encoding="utf-8") as file:
            file.write(f"megabatch: {text}\n")


class StopRequests:
    """Counts stop requests (SIGINT, SIGTERM and SIGUSR2) inside its `with` block."""

    def __init__(self) -> None:
        self.count = 0
        self._before: Mapping[int, object] = {}

    def __enter__(self) -> StopRequests:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        self._before = {number: signal.signal(number, self._heard) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextlib.contextmanager
def _removed_at_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _kill_at_end(tag: str) -> Iterator[None]:
    """Ends every process of the run, even in another session."""
    try:
        yield
    finally:
        end_processes(lambda: tagged_processes(tag))


def _start(job: JobSpec, shared: Mapping[str, str], *, attempt: int, request: Path, tag: str) -> list[_Rank]:
    shared = os.environ | dict(shared) | dict([tag.split("=", 1)])
    shared |= {"MEGABATCH_ATTEMPT": str(attempt), "MEGABATCH_STOP_REQUEST": str(request)}
    shared.pop("MEGABATCH_JOB_ID", None)  # variables of a job that we may be running in
    parent = os.getpid()

    def before_exec() -> None:
        die_with_parent(parent)
        # signals before the rank installs its handlers must not end it: it then finds the stop request as a file
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    ranks = []
    for rank in range(job.world_size):
        path = job.files.rank_log(rank, attempt)
        with open(path, "ab") as log:
            process = subprocess.Popen(
                job.command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=job.working_directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=before_exec,  # noqa: PLW1509 - takes no lock
            )
        ranks.append(_Rank(rank, process, path))
    return ranks


def _watch(
    ranks: list[_Rank], requests: Requests, output: _Output, beat: hang.Watch, *, request: Path, failed: Path
) -> int:
    """Waits for all ranks, shows rank 0's log and passes a stop request on: first as a file, then as a signal.

    Writes the first rank that fails to `failed`, like the batch script: rank, exit code, node.
    """
    died_at, looked_at = None, time.monotonic()
    first: _Failure | None = None
    while any(rank.code is None for rank in ranks):
        _wait_for_an_end(ranks)
        output.show()
        passed, looked_at = time.monotonic() - looked_at, time.monotonic()
        if requests.count and not request.exists():
            request.touch()
            for rank in ranks:
                rank.ask_to_stop()
        first = first or _first_failure(ranks)
        if first is None and beat.hangs(min(passed, 1.0)):  # a machine that slept did not hang
            first = _Failure(_name_hung(ranks, output), ExitCode.HUNG)
        if first is not None and died_at is None:
            died_at = looked_at
        if requests.count > 1 or (died_at is not None and looked_at - died_at > _LAST_WORDS_S):
            for rank in ranks:
                rank.kill()
    output.show()
    first = first or _first_failure(ranks)
    if first is None:
        return max((rank.code or 0 for rank in ranks), default=0)
    node = socket.gethostname()
    failed.write_text(f"{first.rank} {first.code} {node}\n", encoding="utf-8")
    log = ranks[first.rank].log
    output.say(f"rank {first.rank} on {node} failed first, with exit code {first.code}: {log}")
    return first.code


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    code: int


def _first_failure(ranks: list[_Rank]) -> _Failure | None:
    """The rank that failed; if several ended since the last poll, one that did not merely lose its peers."""
    failed = [_Failure(rank.number, rank.code) for rank in ranks if rank.code not in (None, *_ENDED_WELL)]
    return min(failed, key=lambda one: one.code == ExitCode.CRASHED, default=None)


def _name_hung(ranks: list[_Rank], output: _Output) -> int:
    """Makes all ranks write their stacks, and reports which one to look at first."""
    output.say("no heartbeat; every rank writes its stacks to its log")
    for rank in ranks:
        rank.ask_where()
    time.sleep(hang.ANSWER_S)
    number, why = hang.suspect([rank.log for rank in ranks])
    output.say(f"the run hangs; rank {number} on {socket.gethostname()} {why}: {ranks[number].log}")
    return number


def _wait_for_an_end(ranks: list[_Rank]) -> None:
    """Waits until a rank ends, with a time limit: the peers of a dead rank follow within milliseconds."""
    poll, descriptors = select.poll(), []
    for rank in ranks:
        if rank.code is None:
            descriptors.append(os.pidfd_open(rank.process.pid))
            poll.register(descriptors[-1], select.POLLIN)
    poll.poll(_POLL_S * 1000)
    for descriptor in descriptors:
        os.close(descriptor)
