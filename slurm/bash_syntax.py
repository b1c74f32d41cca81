"""Checks that the user's bash lines cannot swallow the rest of a job script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from megabatch.errors import Fault

_REST = "fi"
"""Stands for the rest of the script: bash rejects it as a command of its own, and accepts it inside any other."""
_PLACE = re.compile(r"^(?:\S*bash: )?line \d+: ")


def setup_faults(lines: Sequence[str], *, file: object) -> Iterator[Fault]:
    """The first line of a profile's `setup` with a syntax error in bash; the fault names `file`.

    A command may span lines, like `if` … `fi`. Without bash on this machine there are no faults.
    """
    bash = shutil.which("bash")
    if bash is None or not lines or _fault(bash, lines) is None:
        return
    number = next(n for n in range(len(lines), 0, -1) if _fault(bash, lines[: n - 1]) is None) - 1
    rule = f"in {file}: {_fault(bash, lines)}; the rest of the job script would not run; fix it"
    yield Fault(f"cluster.setup[{number}]", lines[number], rule)


def _fault(bash: str, lines: Sequence[str]) -> str | None:
    """The fault of the lines together, in bash's words if it prints any."""
    if any("\0" in line for line in lines):
        return "bash drops the NUL character in it"
    text = "".join(f"{line}\n" for line in lines)
    if said := _complaint(bash, text):
        return f"bash says: {said}"
    if f"`{_REST}'" not in (_complaint(bash, text + _REST) or ""):
        return "it continues into the next line of the script"
    return None


def _complaint(bash: str, text: str) -> str | None:
    """The first line that `bash -n` prints, without its place; also a warning, as for an unended here-document."""
    # `shopt` is not run here, so what it would turn on stays off
    options = ["-O", "extglob"] if "extglob" in text else []
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = subprocess.run(
        [bash, "--noprofile", "--norc", *options, "-n"],
        input=text.encode(errors="surrogateescape"), env=environment, capture_output=True, check=False,
    )  # fmt: skip
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return _PLACE.sub("", said[0]) if said else None if done.returncode == 0 else f"exit code {done.returncode}"
