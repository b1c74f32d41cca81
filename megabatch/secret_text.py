"""Recognising secrets in names and values, so that none is written down or shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

SECRET_NAME = re.compile(
    r"(^|[_-])(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API[_-]?KEY|ACCESS[_-]KEY|PRIVATE[_-]KEY)([_-]|$)", re.I
)
"""`HF_TOKEN`, `wandb-api-key`; not `max_tokens` or `tokenizer`."""

_IN_URLS = (
    ("a URL with a password in it", re.compile(r"(?<=://)[^/\s@?#'\"]+(?=@)")),
    # what a path makes of one
    ("a URL with a password in it", re.compile(r"(?<=:/)[^/\s@?#'\":]+:[^/\s@?#'\"]+(?=@)")),
    (
        "a secret in a URL's query",
        re.compile(r"(?<=[?&])(?:[\w-]*[_-])?(?:token|secret|password|api_?key|signature)=[^&\s'\"#]+", re.I),
    ),
)
_TOKENS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{20,}")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})")),
    ("an API key", re.compile(r"\bsk-[\w-]{20,}")),
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
)
_KINDS = (*_IN_URLS, *_TOKENS)
_FIXED = ("an AWS access key", "a private key")
"""Forms that nothing else has; the others are random letters and digits after a prefix."""
_ASSIGNED = re.compile(r"\b([A-Za-z][\w-]*)=(?=['\"]?[^\s'\"$])")


def secret_in(text: str) -> str | None:
    """What kind of secret a value holds; None for an ordinary one."""
    return next((kind for kind, pattern in _KINDS if pattern.search(text)), None)


def tokens_in(text: str) -> Iterator[tuple[int, str]]:
    """Number (1 first) and kind of each line that holds a token by its form; words of ordinary code are none."""
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in _TOKENS:
            if any(kind in _FIXED or _is_random(match[0]) for match in pattern.finditer(line)):
                yield number, kind


def _is_random(text: str) -> bool:
    return any(map(str.isupper, text)) and any(map(str.islower, text)) and any(map(str.isdigit, text))


def secret_assigned_in(line: str) -> str | None:
    """Name of a variable or option that a line of shell gives a secret, as in `export WANDB_API_KEY=…`."""
    return next((m[1] for m in _ASSIGNED.finditer(line) if SECRET_NAME.search(m[1])), None)


def masked(text: str) -> str:
    """The text with every secret in it replaced by `…`."""
    for _, pattern in _KINDS:
        text = pattern.sub("…", text)
    return text
