"""`bad_nodes.jsonl`: what the preflight found wrong with a run's nodes, and which of them its next job avoids."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict

from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

AVOIDED_S = 24 * 3600
"""How long later jobs exclude a bad node: sites repair or drain one within a day or so."""
_EXCLUDE = re.compile(r"^#SBATCH --exclude=(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BadNode:
    """One fault of one node."""

    time: float
    """Seconds since the epoch."""
    job_id: str
    attempt: int
    """Number of the run's attempt that found it."""
    node: str
    check: str
    """As in docs/slurm.md: `ecc`, `link`, …"""
    value: str
    """The measured value."""
    rule: str
    """What it should be."""
    excluded: bool
    """Whether the job excludes the node; False if so many nodes were bad that the nodes are not to blame."""

    def plain(self) -> dict[str, object]:
        return asdict(self)


def read_bad_nodes(run: RunDirectory) -> list[BadNode]:
    """Oldest first; skips a line that a full disk cut short."""
    try:
        lines = run.bad_nodes.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(BadNode(**json.loads(line)))
    return found


def avoided(runs: Iterable[RunDirectory]) -> list[str]:
    """Nodes that a job of one of these runs excluded within the last `AVOIDED_S`."""
    since = time.time() - AVOIDED_S
    return sorted({bad.node for run in runs for bad in read_bad_nodes(run) if bad.excluded and bad.time >= since})


def exclude_option(script: str, nodes: Sequence[str]) -> tuple[str, ...]:
    """sbatch's option to exclude them; it includes the script's own exclusions, which the option would replace."""
    if not nodes:
        return ()
    own = [word for text in _EXCLUDE.findall(script) for word in shlex.split(text)]
    return (f"--exclude={','.join([*own, *nodes])}",)


def describe(found: Sequence[BadNode]) -> str:
    """In a few words: `without n1 (ecc)`, `bad: n2 (link, matmul)`; empty for none."""
    texts = []
    for word, excluded in (("without", True), ("bad:", False)):
        checks: dict[str, list[str]] = {}
        for bad in found:
            if bad.excluded is excluded:
                checks.setdefault(bad.node, []).append(bad.check)
        nodes = ", ".join(f"{node} ({', '.join(dict.fromkeys(names))})" for node, names in checks.items())
        texts += [f"{word} {nodes}"] if nodes else []
    return "; ".join(texts)
