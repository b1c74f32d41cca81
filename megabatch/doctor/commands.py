"""Running a command with a time limit."""

from __future__ import annotations

import subprocess

from megabatch.values import dataclass

_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """A command's output on both streams."""

    ok: bool
    text: str

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @property
    def first(self) -> str:
        return self.lines[0] if self.lines else ""


def run_command(*command: str, timeout_s: float = _TIMEOUT_S) -> Answer:
    """Runs a command to its end; a missing or hanging command gives an answer too."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except OSError as error:
        return Answer(False, f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(False, f"{command[0]} does not answer within {timeout_s:.0f} s")
    return Answer(done.returncode == 0, done.stdout)
