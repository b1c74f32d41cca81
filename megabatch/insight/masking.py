"""Masks secrets in output: values of this environment's secret variables, assignments, tokens by their form."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from megabatch.secret_text import is_secret_name, masked

_ASSIGNMENT = re.compile(r"\b([A-Za-z][\w-]*)(['\"]?\s*[=:]\s*(?:Bearer )?['\"]?)([^\s'\",;)}\]]{6,})")
_SHORTEST = 6
"""Shorter values would match ordinary words."""
_MASK = "…"


class Masker:
    """Call it with a text or any JSON value."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        values = {value for name, value in variables.items() if is_secret_name(name) and len(value) >= _SHORTEST}
        # mask a value that contains another one first
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self(one) for one in value]
        return {name: self(one) for name, one in value.items()} if isinstance(value, dict) else value

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, _MASK)
        return _ASSIGNMENT.sub(_without_value, masked(text))


def _without_value(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2]}{_MASK}" if is_secret_name(match[1]) else match[0]
