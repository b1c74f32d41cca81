"""`megabatch doctor`: what this machine has, what works without the rest, and how to fix each failure."""

from __future__ import annotations

import json
import textwrap

from megabatch.cli.table import table
from megabatch.doctor.checks import Finding, examine

_MARKS = {"ok": "ok", "missing": "-", "unsupported": "VERSION", "broken": "BROKEN"}


def show_report(*, as_json: bool) -> int:
    """Prints the findings; 1 when something that this machine needs is missing or broken, else 0."""
    findings = examine()
    failed = [finding for finding in findings if finding.needed]
    if as_json:
        plain = [{name: getattr(one, name) for name in one.__slots__} for one in findings]
        print(json.dumps({"ok": not failed, "findings": plain}, indent=2))
    else:
        print(_text(findings, failed))
    return 1 if failed else 0


def _text(findings: list[Finding], failed: list[Finding]) -> str:
    rows = [
        (one.name, "MISSING" if one.needed and one.state == "missing" else _MARKS[one.state], one.found, one.supported)
        for one in findings
    ]
    parts = [table(("", "", "FOUND", "SUPPORTED"), rows)]
    for one in (one for one in findings if one.state != "ok"):
        parts.append(f"\n{one.name}: {one.found or 'not found'}")
        if one.without:
            parts.append(_indented(f"without it: {one.without}"))
        if one.fix:
            parts.append(_indented(f"fix: {one.fix}"))
    names = ", ".join(one.name for one in failed)
    parts.append(f"\n{names} must be fixed" if failed else "\nnothing that this machine needs is missing")
    return "\n".join(parts)


def _indented(text: str) -> str:
    return textwrap.fill(
        text, width=110, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
