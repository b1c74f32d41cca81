"""One result of the doctor: what it found, and the fix."""

from __future__ import annotations

from typing import Literal

from megabatch.values import dataclass

State = Literal["ok", "missing", "unsupported", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    found: str = ""
    """Version, or what went wrong."""
    supported: str = ""
    needed: bool = False
    """Whether this stops the machine from doing its part."""
    without: str = ""
    fix: str = ""


def fine(name: str, found: str) -> Finding:
    """Present and correct."""
    return Finding(name=name, state="ok", found=found)


def note(name: str, found: str, *, without: str, fix: str = "") -> Finding:
    """Missing, but not needed by everyone."""
    return Finding(name=name, state="missing", found=found, without=without, fix=fix)


def fault(name: str, found: str, *, fix: str, supported: str = "", without: str = "") -> Finding:
    """Must be fixed."""
    return Finding(name=name, state="broken", found=found, supported=supported, needed=True, without=without, fix=fix)
