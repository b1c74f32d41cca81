"""The name of a token cache: a digest of everything that decides a token.

| what | digest of |
| --- | --- |
| the datasets | their bytes, or the hub's fingerprint; where they are, if rows are prompts |
| the settings | `Encoding`, and the seed if it selects rows |
| `data.preprocess` | its file |
| the tokenizer | its files, and the keys of `config.json` that select its class |
| the libraries that render and tokenise | their versions |
| our own code from row to sample | the source of its modules |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from megabatch.data.rows import files
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.mixing import Mixing
from megabatch.data.rows.preprocess import source_of
from megabatch.data.rows.sources import Source
from megabatch.data.tokens import tokenizer
from megabatch.data.tokens.encoding import Encoding

FORMAT = 4
"""Increase it when the file format of a cache changes, to rebuild older caches."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_ROOMS = ("rows", "tokens")
"""Folders of `megabatch/data` with the code from row to sample."""
_ABOVE = ("loss_scales.py",)
"""Modules directly in `megabatch` that are part of that code."""
_AFTER_TOKENS = ("data/rows/digests.py", "data/tokens/chunk.py", "data/tokens/workers.py")
"""Modules in these folders that cannot affect tokens; all others may."""
_TOKENIZER_NAMES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece",
                    "sentencepiece", "spm")  # fmt: skip
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".jinja", ".codes")


def cache_key(
    sources: Sequence[Source],
    encoding: Encoding,
    *,
    seed: int,
    shuffle: bool,
    digests: Digests,
    mixing: Mixing | None = None,
) -> str:
    """32 hexadecimal digits; `seed` and `shuffle` matter only if they select rows. Raises: DataError."""
    settings = settings_of(encoding, digests)
    sampling: list[Any] | None = None
    if mixing or any(source.count is not None for source in sources):
        sampling = [seed, shuffle, *([asdict(mixing)] if mixing else [])]
    code = [FORMAT, _code_digest(), {name: _version(name) for name in _LIBRARIES}]
    content = [code, [source.fingerprint(digests) for source in sources], settings, sampling]
    if encoding.rows == "prompts":  # rewards read the columns of a prompt's row at its place
        content.append([[str(path) for path in source.paths] for source in sources])
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def settings_of(encoding: Encoding, digests: Digests) -> dict[str, Any]:
    """The settings as JSON, with digests in place of files. Raises: DataError."""
    settings = asdict(encoding)
    del settings["preprocess_timeout_s"]
    preprocess = None if encoding.preprocess is None else source_of(encoding.preprocess)
    return {**settings, "tokenizer": tokenizer_digest(encoding.tokenizer, digests), "preprocess": preprocess}


def tokenizer_digest(folder: Path, digests: Digests) -> str:
    """Digest of a folder's tokenizer files and of the keys in config.json that select the tokenizer's class.

    Ignores weights in the same folder. Raises: DataError if there is no tokenizer.
    """
    tokenizer.check(folder)
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(folder)
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.is_file() and (path.name.startswith(_TOKENIZER_NAMES) or path.suffix in _TOKENIZER_SUFFIXES):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(digests.content(path))
    digest.update(json.dumps(tokenizer.class_keys(folder), sort_keys=True).encode())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    data = Path(__file__).parent.parent
    rooms = sorted(path for room in _ROOMS for path in (data / room).glob("*.py"))
    for path in [*rooms, *(data.parent / name for name in _ABOVE)]:
        if (name := path.relative_to(data.parent).as_posix()) not in _AFTER_TOKENS:
            digest.update(name.encode())
            digest.update(files.content_digest(path))
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # importing it will raise the error
