"""Real failures of small programs, each with the class that `why` must give it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabatch.slurm.profile import ClusterProfile

_ONE_PROCESS = (
    "import os, resource, threading; os.getuid() or (os.setgid(65534), os.setuid(65534))\n"
    "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
)
"""As nobody: root's limit on processes does not hold."""
_TOOLS = "bash cat grep awk sed getent scontrol squeue timeout rm mkdir mktemp ln mv sleep sort tail date kill env"


@dataclass(frozen=True)
class Failing:
    """A job that fails, and what is to be said of it."""

    cause: str
    evidence: str
    """A part of the line that names it."""
    python: str = ""
    """What rank 0 runs; the other sleeps."""
    bash: str = ""
    setup: tuple[str, ...] = ()
    local: bool = True
    """Whether it fails so without Slurm too."""
    rank: int | None = 0
    spec: dict[str, Any] = field(default_factory=dict)

    def program(self, python: str) -> tuple[str, ...]:
        command = self.bash or f"exec {python} - <<'EOF'\n{self.python}\nEOF"
        return ("bash", "-c", f'if [ "$RANK" != 0 ]; then exec sleep 60; fi\n{command}')


FAILING = {
    "exception": Failing("exception", "KeyError: 'text'", "{}['text']"),
    "refused by name": Failing("config", "parallel.tensor", "raise SystemExit('error: parallel.tensor = 3: no')"),
    "data": Failing(
        "data", "a.jsonl:8", "raise SystemExit('error: /data/a.jsonl:812: not valid JSON; fix that line')"
    ),
    "exit code 2": Failing("config", "exit code 2", "raise SystemExit(2)"),
    "no known cause": Failing("unknown", "exit code 3", bash="exit 3", rank=0),
    "kill -9": Failing("killed", "signal 9", bash="kill -9 $$"),
    "segmentation fault": Failing(
        "killed",
        "Fatal Python error: Segmentation fault",
        "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)",
    ),
    "abort": Failing("killed", "signal 6", "import os; os.abort()"),
    "memory": Failing("oom_host", "MemoryError", "bytearray(1 << 60)"),
    "address space": Failing(
        "oom_host",
        "MemoryError",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytearray(1 << 29)",
    ),
    "full disk": Failing("disk", "No space left on device", "open('/dev/full', 'w', buffering=1).write('x\\n')"),
    "open files": Failing(
        "limit",
        "Too many open files",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))\n"
        "[open('/dev/null') for _ in range(9)][0]",
    ),
    "file size": Failing(
        "limit",
        "File too large",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "with open('large', 'wb') as file: file.write(bytes(1 << 21))",
    ),
    "threads": Failing(
        "limit",
        "can't start new thread",
        _ONE_PROCESS + "[threading.Thread(target=threading.Event().wait, daemon=True).start() for _ in range(9)]",
    ),
    "fork": Failing(
        "limit",
        "Resource temporarily unavailable",
        _ONE_PROCESS + "os.fork() or os._exit(0)",
    ),
    "port in use": Failing(
        "network",
        "Address already in use",
        "import socket; a = socket.create_server(('127.0.0.1', 0)); socket.create_server(a.getsockname())",
    ),
    "name of no host": Failing(
        "network", "not known", "import socket; socket.getaddrinfo('no-such-host.invalid.', 80)"
    ),
    "module": Failing("environment", "No module named 'megatrain'", "import megatrain"),
    "library": Failing("environment", "cannot open shared", "import ctypes; ctypes.CDLL('libnccl.so.999')"),
    "program": Failing("environment", "apptainerx: command not found", bash="apptainerx exec image.sif true"),
    "exec": Failing("environment", "apptainerx: not found", bash="exec apptainerx exec image.sif true"),
    "no python": Failing("environment", "/nowhere/bin/python", bash="/nowhere/bin/python -m megabatch.trainer.main"),
    "not executable": Failing("environment", "Permission denied", bash="exec /etc/passwd"),
    "a line of setup": Failing("environment", "at: false", setup=("false",), local=False, rank=None),
    "exit in setup": Failing("environment", "at: exit 0", setup=("exit 0",), local=False, rank=None),
    "setup of a site": Failing("environment", "env.sh: No such", setup=(". /nowhere/env.sh",), local=False, rank=None),
    "module load": Failing("environment", "module", setup=("module load cuda/99",), local=False, rank=None),
    "no srun": Failing("environment", "srun: not found", setup=("PATH=TOOLS",), local=False, rank=None),
    "unmet dependency": Failing("dependency", "DependencyNeverSatisfied", bash="true", local=False, rank=None),
}


def profile_of(failing: Failing, folder: Path) -> ClusterProfile:
    """Where the job runs; `TOOLS` in its setup is a folder of all that a job script calls, but srun."""
    tools = folder / "tools"
    if any("TOOLS" in line for line in failing.setup):
        tools.mkdir()
        for name in _TOOLS.split():
            if (path := shutil.which(name)) is not None:
                (tools / name).symlink_to(path)
    return ClusterProfile(setup=tuple(line.replace("TOOLS", str(tools)) for line in failing.setup))


Run = Callable[[Failing, Path], Path]
