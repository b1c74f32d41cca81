"""`megabatch diff`: how two runs differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megabatch.cli.runs import one_run
from megabatch.insight.comparison import Differences, code_diff, compare
from megabatch.insight.masking import Masker
from megabatch.table import table, terminal_width


def show_diff(a: Path, b: Path, *, code: bool, as_json: bool) -> int:
    """Prints what differs; secrets are masked. Raises: LaunchError for a path without a run."""
    runs = one_run(a), one_run(b)
    found, mask = compare(*runs), Masker()
    lines = list(code_diff(*runs)) if code else []
    if as_json:
        print(json.dumps(mask(found.plain() | ({"code_diff": lines} if code else {})), indent=2))
        return 0
    if found.same:
        print("no difference" + (f"; code: {found.code_note}" if found.code_note else ""))
        return 0
    sections = [
        ("configuration", _values(found.config)),
        ("derived from it", _values(found.derived)),
        ("environment", _values(found.environment)),
        ("code", "\n".join(found.code) or found.code_note),
        ("", "\n".join(lines)),
        ("script", "\n".join(found.script)),
    ]
    print(mask.text("\n\n".join(f"{title}\n{_indented(text)}" if title else text for title, text in sections if text)))
    return 0


def _values(found: Differences) -> str:
    rows = [(name, _shown(before), "->", _shown(after)) for name, (before, after) in found.items()]
    return table(rows[0], rows[1:], width=terminal_width() - 4) if rows else ""


def _shown(value: Any) -> str:
    """The value as JSON, so that 1 and "1" look different; empty for a missing value."""
    return "-" if value is None else json.dumps(value) if not isinstance(value, str) else value


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
