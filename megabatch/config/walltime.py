"""Slurm's formats of a time limit."""

from __future__ import annotations

import re

from megabatch.errors import ConfigError

_FORM = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def seconds(time: str) -> int:
    """Seconds of `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes[:seconds]`.

    Raises: ConfigError when it is none of these, or nothing.
    """
    match = _FORM.fullmatch(time.strip())
    if not match:
        raise ConfigError("must be minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = (*parts, 0, 0)[:3]
        total = int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    elif len(parts) == 3:
        total = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:
        total = parts[0] * 60 + sum(parts[1:])
    if not total:
        raise ConfigError("must be above 0")
    return total
