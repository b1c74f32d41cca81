"""Starts processes, waits for them, and leaves none behind (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megabatch.errors import LaunchError

Daemon = subprocess.Popen[bytes]

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends; for `preexec_fn`.

    If the parent ended between fork and this call, this process ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def program_path(name: str) -> str | None:
    """Path of a program; Debian keeps daemons in /usr/sbin."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def start_daemon(command: list[str], environment: Mapping[str, str], *, log: Path, tied: bool) -> Daemon:
    """Starts `command` in a session of its own with output to `log`; `tied` ends it with this process."""
    parent = os.getpid()
    with open(log, "ab") as output:
        return subprocess.Popen(
            [program_path(command[0]) or command[0], *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=(lambda: die_with_parent(parent)) if tied else None,  # noqa: PLW1509 - takes no lock
        )


def tagged_processes(tag: str, *, also: str = "") -> set[int]:
    """Processes started with `tag` (`NAME=value`) in their environment, and a variable that begins with `also`."""
    found: set[int] = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                variables = Path(entry.path, "environ").read_bytes().split(b"\0")
                if tag.encode() in variables and any(v.startswith(also.encode()) for v in variables):
                    found.add(int(entry.name))
    return found


def descendants(pids: set[int]) -> set[int]:
    """`pids` with all their children and children's children."""
    children: dict[int, set[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # the command's name may contain spaces and parentheses: count fields from the last parenthesis
                parent = int(Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, set()).add(int(entry.name))
    found, todo = set(pids), list(pids)
    while todo:
        new = children.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def identity(pid: int) -> str:
    """Host, number and start time of a process, since numbers are reused. Empty when there is no such process here."""
    with contextlib.suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if words[0] in "ZX" else f"{_place()}:{pid}:{words[19]}"
    return ""


def has_ended(process: str) -> bool:
    """Whether we know that a process, given its `identity`, has ended: we know nothing of processes elsewhere."""
    place, number, _ = process.rsplit(":", 2) if process.count(":") == 2 else ("", "", "")
    return number.isdigit() and place == _place() and identity(int(number)) != process


@functools.cache
def _place() -> str:
    """Scope of process numbers: this host since its boot, and this container on it."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return "/".join((socket.gethostname(), boot, namespace))


def end_processes(find: Callable[[], set[int]], *, timeout_s: float = 10) -> None:
    """Kills the processes that `find` returns and all their descendants, until `find` returns nothing."""
    deadline = time.monotonic() + timeout_s
    while (pids := _alive(find())) and time.monotonic() < deadline:
        for pid in descendants(pids) - {os.getpid()}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/environ").exists() and _state(pid) not in ("Z", "")}


def _state(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    return ""


def wait_for(condition: Callable[[], bool], *, what: str, log: Path, timeout_s: float = 10) -> None:
    """Waits until the condition holds. Raises: LaunchError with the end of `log` on a timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LaunchError(f"{what} did not start:\n{last_lines(log)}")
        time.sleep(0.02)


def last_lines(path: Path, lines: int = 8) -> str:
    """The log's name and its last lines, for an error message."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join([f"{path}:", *(f"  {line}" for line in text)])
    return f"{path}: not written"
