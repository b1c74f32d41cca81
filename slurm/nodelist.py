"""Lists of nodes as Slurm writes them."""

from __future__ import annotations

import re

_PART = re.compile(r"([^,\[]+)(?:\[([^\]]*)\]([^,\[]*))?")


def node_names(nodes: str) -> list[str]:
    """Expands `n[1-2,08-10],login` to names, in order: n1, n2, n08, n09, n10, login."""
    found: list[str] = []
    for match in _PART.finditer(nodes):
        front, ranges, back = match[1], match[2], match[3] or ""
        if ranges is None:
            found.append(front)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first.isdigit() else []
            found += [f"{front}{number:0{len(first)}d}{back}" for number in numbers]
    return found
