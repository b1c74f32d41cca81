"""A job's servers on this machine, without Slurm: started healthy before the ranks, watched, stopped after them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from megabatch.config.roles import Role
from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.ports import free_port_block
from megabatch.slurm.processes import die_with_parent
from megabatch.slurm.roles import check_roles, role_job
from megabatch.slurm.script.roles import GRACE_S, LAST_LINES
from megabatch.values import dataclass

_POLL_S = 0.1


class Requests(Protocol):
    """How often a run was asked to stop: the first request makes it save, the second kills it."""

    @property
    def count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Server:
    role: Role
    task: int
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "".join(f"\n    {line}" for line in lines)


class Servers:
    """All servers of a job. While the ranks' loop watches them, a server that ends makes the ranks save and stop."""

    def __init__(self, job: JobSpec, requests: Requests, say: Callable[[str], None]) -> None:
        self._job, self._requests, self._say = job, requests, say
        self._servers: list[_Server] = []
        self._own_requests = 0
        self._ranks_ended = threading.Event()
        self.failed: int | None = None
        """Exit code of a server that ended without being asked, or never became ready."""

    @property
    def count(self) -> int:
        """Stop requests: the user's, and one for servers that ended."""
        return self._requests.count + self._own_requests

    def start(self, environment: Mapping[str, str], *, attempt: int) -> dict[str, str]:
        """Starts the servers, waits until all answer, and returns the variables that tell the ranks about them.

        If one does not answer, `failed` records it and no rank may start. Raises: LaunchError for a faulty role.
        """
        check_roles(self._job.roles)
        if not self._job.roles:
            return {}
        token = secrets.token_hex(32)
        ranks_own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        shared = {k: v for k, v in environment.items() if k not in ranks_own} | {"MEGABATCH_ROLE_TOKEN": token}
        for role in self._job.roles:
            for task in range(role.tasks):
                self._servers.append(self._started(role, task, shared, attempt=attempt))
        for server in self._servers:
            self._wait_for(server, token)
            if self.failed is not None:
                return {}
        threading.Thread(target=self._watch, daemon=True).start()
        addresses: dict[str, list[str]] = {}
        for server in self._servers:
            addresses.setdefault(server.role.variable, []).append(server.url)
        return {"MEGABATCH_ROLE_TOKEN": token} | {name: ",".join(urls) for name, urls in addresses.items()}

    def stop(self, code: int) -> int:
        """Stops the servers after the ranks ended with `code`; returns the job's exit code."""
        if code not in (ExitCode.DONE, ExitCode.REQUEUE) and self.failed is None:
            self._look()  # ranks that fail because of their server may end before we notice the server's end
        self._ranks_ended.set()
        for server in self._servers:
            server.process.terminate()
        end = time.monotonic() + GRACE_S
        for server in self._servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
        return code if self.failed is None else self.failed

    def _started(self, role: Role, task: int, shared: Mapping[str, str], *, attempt: int) -> _Server:
        port, parent = free_port_block(), os.getpid()
        path = self._job.files.logs / f"{role.name}_{task}.{attempt}.log"
        own = {"MEGABATCH_ROLE": role.name, "MEGABATCH_ROLE_TASK": str(task), "MEGABATCH_ROLE_PORT": str(port)}
        command = role_job(self._job, role).command
        try:
            with open(path, "ab") as log:
                process = subprocess.Popen(
                    command,
                    env=dict(shared) | own | {"MEGABATCH_ATTEMPT": str(attempt)},
                    cwd=self._job.working_directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - takes no lock
                )
        except OSError as error:
            raise LaunchError(f"role {role.name}: cannot run {command[0]}: {error}") from error
        return _Server(role, task, port, path, process)

    def _wait_for(self, server: _Server, token: str) -> None:
        end = time.monotonic() + server.role.ready_s
        request = urllib.request.Request(server.url + server.role.health, headers={"Authorization": f"Bearer {token}"})
        # bypass a proxy from the environment: the servers are on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self._requests.count == 0:
            with contextlib.suppress(OSError, urllib.error.URLError), opener.open(request, timeout=5) as answer:
                if answer.status == 200:
                    return
            if server.process.poll() is not None:
                return self._fail(server, f"ended with exit code {_code(server)} before it was ready", _code(server))
            if time.monotonic() > end:
                what = f"did not answer {server.role.health} within {server.role.ready_s} s"
                return self._fail(server, what, ExitCode.FAILED)
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        while not self._ranks_ended.wait(_POLL_S):
            if self._look():
                self._own_requests = 1
                if not self._ranks_ended.wait(self._job.signal_delay_s):
                    self._own_requests = 2  # the ranks had as much time to save as before a time limit
                return

    def _look(self) -> bool:
        """Checks whether a server has ended."""
        for server in self._servers:
            if server.process.poll() is not None and not self._ranks_ended.is_set():
                if self.failed is None and self._requests.count == 0:
                    code = _code(server)
                    self._fail(server, f"ended with exit code {code} while the ranks ran; asking them to save", code)
                return True
        return False

    def _fail(self, server: _Server, what: str, code: int) -> None:
        self.failed = code or ExitCode.FAILED
        self._say(f"role {server.role.name}, task {server.task} {what}: {server.log}{server.last_lines()}")


def _code(server: _Server) -> int:
    """Exit code as a shell gives it (128 + signal)."""
    code = server.process.returncode
    return 128 - code if code < 0 else code
