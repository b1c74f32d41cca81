"""One result of the doctor: what it found, and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "unsupported", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found of one thing."""

    name: str
    state: State
    found: str = ""
    """Version, or what went wrong."""
    supported: str = ""
    needed: bool = False
    """Whether this machine cannot do its part as it is."""
    without: str = ""
    fix: str = ""


def fine(name: str, found: str) -> Finding:
    """There, and as it should be."""
    return Finding(name=name, state="ok", found=found)


def note(name: str, found: str, *, without: str, fix: str = "") -> Finding:
    """Not there, which some can do without."""
    return Finding(name=name, state="missing", found=found, without=without, fix=fix)


def fault(name: str, found: str, *, fix: str, supported: str = "", without: str = "") -> Finding:
    """What must be fixed."""
    return Finding(name=name, state="broken", found=found, supported=supported, needed=True, without=without, fix=fix)
