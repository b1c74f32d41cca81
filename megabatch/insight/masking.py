"""Secrets out of what is shown: values of secret variables, and what looks like a token."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from megabatch.slurm.script.variables import SECRET_NAME

_ASSIGNMENT = re.compile(
    r"\b(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY))(['\"]?\s*[=:]\s*['\"]?)"
    r"([^\s'\",;)}\]]{6,})",
    re.I,
)
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,})|(?<=Bearer )[A-Za-z0-9._~+/-]{8,}"
)
_SHORTEST = 6
"""Shorter values would be found in innocent words."""
MASK = "***"


class Masker:
    """Replaces the values of secret variables of an environment, and texts of the forms that tokens have."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        values = {value for name, value in variables.items() if SECRET_NAME.search(name) and len(value) >= _SHORTEST}
        # a value that holds another one goes first
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return _ASSIGNMENT.sub(rf"\1\2{MASK}", _TOKENS.sub(MASK, text))
