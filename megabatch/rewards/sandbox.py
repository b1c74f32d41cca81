"""Runs a program that a model wrote: limited in time, memory and files, without network where the system allows it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from megabatch.rewards import confined
from megabatch.values import dataclass

_OUTPUT_BYTES = 2**20
"""Output beyond this is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    code: int | None
    """Exit code, 128 + n for signal n; None when it took too long."""
    output: str
    errors: str


@functools.cache
def lacking() -> tuple[str, ...]:
    """What this machine cannot keep a program from."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-I", confined.__file__, "--probe", folder], capture_output=True, text=True, check=False
        )
    isolated, writes = (word == "True" for word in (done.stdout.split() or ["", ""])[:2])
    return tuple(
        what for what, has in (("using the network", isolated), ("writing files of the run's user", writes)) if not has
    )


def run(program: str, *, stdin: str = "", seconds: int, memory_mib: int) -> Outcome:
    """Runs it in an empty folder and environment.

    Args: `seconds` of CPU time, and twice as many of wall-clock time; `memory_mib` of address space.
    """
    with tempfile.TemporaryDirectory(prefix="megabatch_code_", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8", errors="replace")
        with open(Path(folder) / "stdout", "w+b") as out, open(Path(folder) / "stderr", "w+b") as err:
            process = subprocess.Popen(
                [sys.executable, "-I", confined.__file__, folder, str(seconds), str(memory_mib), str(file)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            code = _wait(process, stdin, 2 * seconds)
            return Outcome(code=code, output=_read(out), errors=_read(err))


def _wait(process: subprocess.Popen[bytes], stdin: str, timeout_s: float) -> int | None:
    try:
        with contextlib.suppress(BrokenPipeError):
            process.communicate(stdin.encode("utf-8", "replace"), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _read(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(_OUTPUT_BYTES).decode("utf-8", "replace")
