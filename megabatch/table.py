"""Plain tables and short numbers for a terminal."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence

NARROWEST = 12
"""A cut column keeps at least this many characters."""


def terminal_width() -> int:
    """Width of the terminal; 120 without one."""
    return shutil.get_terminal_size((120, 24)).columns


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Columns as wide as their widest cell; the last one is not padded.

    Args: `width` limits a line: to fit, the first column is cut at its front and the last one at its end.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(text_width(line[column]) for line in lines) for column in range(len(header))]
    if width is not None:
        _cut(lines, widths, width=width)
    return "\n".join(
        "  ".join([*(_padded(cell, size) for cell, size in zip(line[:-1], widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def _cut(lines: list[list[str]], widths: list[int], *, width: int) -> None:
    """Cuts the last column, then the first, each to at least twice NARROWEST; then both again, down to NARROWEST."""
    last = len(widths) - 1
    for column, least in ((last, 2 * NARROWEST), (0, 2 * NARROWEST), (last, NARROWEST), (0, NARROWEST)):
        excess = sum(widths) + 2 * last - width
        size = max(min(least, widths[column]), widths[column] - max(0, excess))
        if size < widths[column]:
            widths[column] = size
            for line in lines:
                if text_width(line[column]) > size:
                    line[column] = _shortened(line[column], size, at_front=column == 0)


def _shortened(text: str, size: int, *, at_front: bool) -> str:
    while text and text_width(text) > size - 1:
        text = text[1:] if at_front else text[:-1]
    return "…" + text if at_front else text + "…"


def text_width(text: str) -> int:
    """Terminal columns: two per wide character (Chinese, Japanese, Korean, emoji), none per combining mark."""
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _padded(text: str, size: int) -> str:
    return text + " " * (size - text_width(text))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def amount(value: float) -> str:
    """About three digits: `950`, `12.3k`, `4.56M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.0f}"
