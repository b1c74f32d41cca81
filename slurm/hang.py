"""Detects that a run hangs, and names the suspect rank: shared by the batch script and the local launcher.

While `heartbeat.json` does not change, the run makes no progress. We watch from outside the ranks: a rank that is
stopped, or whose Python lock is held, cannot watch itself. On SIGUSR1, each rank writes its stacks and its activity
(megabatch/trainer/activity.py) to its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_FACTOR = 4
"""The first step may take this many times longer: it tokenises data and compiles kernels."""
ANSWER_S = 5
"""Time for the ranks to write their stacks."""

SUSPECT = """\
function say(rank, why) { print rank, why; exit }
match($0, /^rank [0-9]+ is at step [0-9]+, [a-z ]+/) {
    place = substr($0, RSTART, RLENGTH); sub(/^rank [0-9]+ is /, "", place); at[$2] = place
}
END {
    for (rank = 0; rank < world; rank++) if (rank in at) count[at[rank]]++
    for (rank = 0; rank < world; rank++) if (!(rank in at)) say(rank, "does not answer: stopped, or stuck in a call")
    for (place in count) if (!rarest || count[place] < count[rarest]) rarest = place
    others = count[rarest] == world ? ", as all are" : ", unlike the others"
    for (rank = 0; rank < world; rank++) if (at[rank] == rarest) say(rank, "is " rarest others)
}
"""
"""An awk program over the logs of `world` ranks: prints the rank to look at first, and why."""


@dataclass(slots=True)
class Watch:
    """Watches a heartbeat from outside: counts the time since it last changed."""

    heartbeat: Path
    timeout_s: float
    """0 waits for ever."""
    _first: bytes = field(init=False)
    _last: bytes = field(init=False)
    _idle_s: float = 0.0

    def __post_init__(self) -> None:
        self._first = self._last = self._read()

    def hangs(self, passed_s: float) -> bool:
        """Whether the run hangs, `passed_s` after the last call; time in which the machine slept does not count."""
        beat = self._read()
        self._idle_s = 0.0 if beat != self._last else self._idle_s + passed_s
        self._last = beat
        starting = beat == self._first or b'"state": "starting"' in beat
        return 0 < self.timeout_s * (START_FACTOR if starting else 1) <= self._idle_s

    def _read(self) -> bytes:
        try:
            return self.heartbeat.read_bytes()
        except OSError:
            return b""


def suspect(logs: Sequence[Path]) -> tuple[int, str]:
    """The rank to look at first and what it does, from all ranks' logs after SIGUSR1."""
    import subprocess  # rendering a script needs only the constants, and takes less time than this import

    command = ["awk", "-v", f"world={len(logs)}", SUSPECT, *map(str, logs)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rank, _, why = said.strip().partition(" ")
    return int(rank), why
