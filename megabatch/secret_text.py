"""Recognises secrets in names, values and command lines, so that none is stored or shown."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRONG = _words("token secret password passwd passphrase credential credentials apikey secrets passwords")
"""Words that mark a name as a secret's, wherever they appear in it."""
_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key")})
_WEAK = _words("key pass pwd auth")
"""Words that do so only at the end of a name, and only after certain words."""
_SERVICES = _words(
    "account admin anthropic azure basic client cloud cohere comet database db deepseek docker elastic encryption es "
    "ftp gcp gemini gitlab groq hf http https huggingface login mail master minio mistral mongo mysql neptune ngc "
    "nvidia openai pg postgres postgresql proxy redis registry root s3 service shared signing smtp sql storage "
    "subscription user wandb"
)
"""Things that have secrets: `--openai-key`, `--db_pass`; the key of `--text_key` is a column's name."""
_NO_SERVICES = _words(
    "backward cache column dict disable enable field first foreign forward group image label layer lookup map multi "
    "no num one partition primary prompt public query require second single skip sort ssh text two use value with "
    "without"
)
"""First words that make an upper-case variable no secret (`SORT_KEY`, `USE_AUTH`); any other word leaves it one."""
_BEFORE_TOKEN = _words(
    "audio begin bos cls end eos extra first image last mask max min moe negative new next num pad per positive "
    "prompt sep special start stop think unk video vision"
)
"""Words that turn `token` into a count of tokens or a vocabulary's token."""
_AFTER_TOKEN = _words("budget count dim dispatcher drop id ids index len length limit limits loss num size type types")
_PLACES = _words("dir file path sock socket")
"""Name endings that give a secret's location, which is no secret itself."""
_SWITCHES = frozenset(["", "0", "1", "true", "false", "yes", "no", "on", "off", "none", "null", "auto"])

_IN_URLS = (
    ("a URL with a password in it", re.compile(r"(?<=://)[^/\s@?#'\"]+(?=@)")),
    # how a path changes one
    ("a URL with a password in it", re.compile(r"(?<=:/)[^/\s@?#'\":]+:[^/\s@?#'\"]+(?=@)")),
    (
        "a secret in a URL's query",
        re.compile(
            r"(?<=[?&])(?:(?:[\w-]*[_-])?(?:token|secret|password|passwd|api_?key|signature)|sig)=[^&\s'\"#]+", re.I
        ),
    ),
)
_TOKENS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{20,}")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})")),
    ("a GitLab token", re.compile(r"\bgl(?:pat|dt|rt|cbt|ptt|soat)-[\w-]{20,}")),
    ("a Slack token", re.compile(r"\bx(?:ox[abeprs]|app)-[\w-]{10,}")),
    ("a Google API key", re.compile(r"\bAIza[\w-]{35}")),
    ("an NVIDIA API key", re.compile(r"\bnvapi-[\w-]{20,}")),
    ("an API key", re.compile(r"\bsk-[\w-]{20,}")),
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a JSON web token", re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+")),
)
_HEADERS = (
    ("a secret for HTTP", re.compile(r"(?<=Bearer )\s*(?=[^\s'\"]*\d)[\w.~+/-]{8,}=*", re.I)),
    (
        "a secret for HTTP",
        re.compile(r"\bAuthorization['\"]?\s*[:=]\s*['\"]?(?:Basic|Bearer|Digest|Token)\s+[^\s'\"$<{…]{4,}", re.I),
    ),
)
_KINDS = (*_IN_URLS, *_TOKENS, *_HEADERS)
_FIXED = ("an AWS access key", "a private key")
"""Formats unique to secrets; the others are random letters and digits after a prefix."""

# a call is no value: `token=os.environ.get(…)`
_VALUE = r"['\"]?([^\s'\"$`;,&|()\[\]{}<>]++)(?![(\[])"
_GIVEN = re.compile(
    rf"\b([A-Za-z][\w.-]*)(?:=|['\"]\s*:\s*(?=['\"])){_VALUE}"  # NAME=value, --name=value, "name": "value"
    rf"|(?<![\w-])--?([A-Za-z][\w.-]*)\s+(?!-){_VALUE}"  # --name value
)
_OPTION = re.compile(r"--?([A-Za-z][\w.-]*)")
_WITH_VALUE = re.compile(r"--?([A-Za-z][\w.-]*)=([^$].*)|([A-Za-z][\w-]*):\s*([^$\s].*)", re.DOTALL)
"""An option with its value, or a header."""


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a variable, option or key of that name holds a secret: `HF_TOKEN`, `wandb-api-key`, `DB_PASS`; not
    `max_tokens`, `eos_token` or `HF_TOKEN_PATH`."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words = [word for word in re.split(r"[_.-]", apart) if word]
    if not words or words[-1] in _PLACES:
        return False
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        of_text = word == "token" and (before in _BEFORE_TOKEN or after in _AFTER_TOKEN)
        if (word in _STRONG and not of_text) or (word, after) in _PAIRS or word.endswith("apikey"):
            return True
    if len(words) < 2 or words[-1] not in _WEAK:
        return False
    return words[-2] in _SERVICES or (name.isupper() and words[-2] not in _NO_SERVICES)


def secret_in(text: str) -> str | None:
    """The kind of secret that a value holds; None for an ordinary value."""
    return next((kind for kind, pattern in _KINDS if pattern.search(text)), None)


def secret_given(name: str, value: str) -> str | None:
    """The kind of secret that a variable or option is set to; None for an ordinary value, for a switch, and for the
    name of a variable that holds the secret."""
    if is_secret_name(name) and value.lower() not in _SWITCHES and not _is_name(value):
        return f"a value for {name}"
    return secret_in(value)


def secret_assigned_in(line: str) -> str | None:
    """Name of a variable, option or key that a line of shell or JSON gives a secret: `export WANDB_API_KEY=…`."""
    for match in _GIVEN.finditer(line):
        name, value = (match[1], match[2]) if match[1] else (match[3], match[4])
        if is_secret_name(name) and value.lower() not in _SWITCHES and not _is_name(value):
            return name
    return None


def secrets_in_words(words: Sequence[str]) -> Iterator[str]:
    """Kinds of the secrets among a program's arguments: `--name=value`, `--name value`, `NAME=value`, headers, known
    forms, and all of these inside a word that is a script or JSON."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        kind, option, whole = None, _OPTION.fullmatch(word), _WITH_VALUE.fullmatch(word)
        if option and is_secret_name(option[1]) and not following.startswith(("--", "$")):
            kind = secret_given(option[1], following)
        elif whole:
            kind = secret_given(whole[1] or whole[3], whole[2] or whole[4])
        name = secret_assigned_in(word)
        kind = kind or (f"a value for {name}" if name else secret_in(word))
        if kind is not None:
            yield kind


def tokens_in(text: str) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and kind of each token recognised by its format; ordinary code does not match."""
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in _TOKENS:
            if any(kind in _FIXED or _is_random(match[0]) for match in pattern.finditer(line)):
                yield number, kind


def masked(text: str) -> str:
    """The text with every secret in it replaced by `…`."""
    for _, pattern in _KINDS:
        text = pattern.sub("…", text)
    return text


def _is_random(text: str) -> bool:
    return any(map(str.isupper, text)) and any(map(str.islower, text)) and any(map(str.isdigit, text))


def _is_name(value: str) -> bool:
    """Whether it names a variable that holds a secret, as `--hub_token HF_TOKEN` does."""
    return value.isupper() and is_secret_name(value)
