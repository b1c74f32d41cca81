"""Bytes for people."""

from __future__ import annotations


def in_words(count: int) -> str:
    """In powers of 1000, as disks count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
