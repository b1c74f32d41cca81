"""Reads the ends of long files, within a bound."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FIRST_BYTES = 2**13
MOST_BYTES = 2**18
"""A metrics line has about 500 bytes: enough to look back over hundreds of evaluations."""


def tail(path: Path, most_bytes: int) -> bytes:
    """The last bytes of a file; empty for a missing file, and for a pipe, which would block."""
    try:
        if not path.is_file():
            return b""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most_bytes))
            return file.read(most_bytes)
    except OSError:
        return b""


def last_step(metrics: Path) -> dict[str, Any]:
    """The newest whole line of a training step in `metrics.jsonl`; empty before the first."""
    for most_bytes in (FIRST_BYTES, MOST_BYTES):
        text = tail(metrics, most_bytes)
        for line in reversed(text.splitlines()):
            if b'"train"' not in line:
                continue
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and value.get("kind") == "train":
                return value
        if len(text) < most_bytes:
            break
    return {}


def last_lines(path: Path, count: int, *, most_bytes: int = 2**16) -> list[str]:
    """The last `count` lines of a log, decoded as text whatever it contains."""
    return tail(path, most_bytes).decode(errors="replace").splitlines()[-count:]
