"""`model.new_special_tokens`: tokens that a run adds to its tokenizer.

They are added to the tokenizer's files and not by transformers' `save_pretrained`, whose files only its own major
version reads. Nothing but the new tokens changes in them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megabatch.errors import DataError
from megabatch.values import dataclass

FIELD = "model.new_special_tokens"
TOKENIZER = "tokenizer.json"
WRITTEN = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that name added tokens."""
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_LISTS = ("extra_special_tokens", "additional_special_tokens")
"""Keys of tokenizer_config.json and special_tokens_map.json: the first since transformers 5."""


def listed(given: Sequence[str]) -> tuple[str, ...]:
    """The tokens of a recipe: those given, and those in `.txt` files, one per line.

    Raises: DataError for a file without tokens, a token with white space, and one that is given twice.
    """
    tokens = [token for text in given for token in (_in_file(text) if text.endswith(".txt") else [text])]
    for token in tokens:
        if not token or any(map(str.isspace, token)):
            raise DataError(f"{FIELD}: {token!r} is no token: it must have characters, and no white space among them")
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise DataError(f"{FIELD}: {twice[0]!r} is given twice; give each token once")
    return tuple(tokens)


def _in_file(text: str) -> list[str]:
    path = Path(text).expanduser()
    if path.exists() and not path.is_file():
        raise DataError(f"{FIELD}: {path} is not a regular file; give one with one token per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as e:
        raise DataError(f"{FIELD}: {path} cannot be read ({e.strerror}); give a file with one token per line") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{FIELD}: {path} is not UTF-8 text; save it as UTF-8") from e
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise DataError(f"{FIELD}: {path} is empty; give a file with one token per line")
    return tokens


def rows_with(folder: Path, tokens: Sequence[str]) -> int:
    """Ids of a tokenizer once it has these tokens too, from 0 on: the rows that an embedding needs at least.

    Raises: DataError for a token that it has already, and for a tokenizer to which we cannot add any.
    """
    known = _known(folder)
    if there := [token for token in tokens if token in known.ids]:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise DataError(
            f"{FIELD}: {there[0]!r} is a token of {folder} already, with id {known.ids[there[0]]}{more}; leave it out"
        )
    return known.following + len(tokens)


def write_with(folder: Path, tokens: Sequence[str], target: Path) -> None:
    """Writes the files of the tokenizer in `folder` that name added tokens into `target`, with these tokens too.

    Raises: DataError as `rows_with`; OSError.
    """
    first = rows_with(folder, tokens) - len(tokens)
    numbered = {token: first + place for place, token in enumerate(tokens)}
    made = _read(folder / TOKENIZER)
    entries = [{"id": number, "content": token, **_FLAGS} for token, number in numbered.items()]
    _write(target / TOKENIZER, {**made, "added_tokens": [*(made.get("added_tokens") or ()), *entries]})
    config = _declared(_read(folder / "tokenizer_config.json"), tokens)
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        more = {str(number): {"content": token, **_FLAGS} for token, number in numbered.items()}
        config = {**config, "added_tokens_decoder": {**decoder, **more}}
    _write(target / "tokenizer_config.json", config)
    if (folder / "special_tokens_map.json").is_file():
        _write(target / "special_tokens_map.json", _declared(_read(folder / "special_tokens_map.json"), tokens))
    if (folder / "added_tokens.json").is_file():
        _write(target / "added_tokens.json", {**_read(folder / "added_tokens.json"), **numbered})


def of_the_data(tokens: Collection[str], templates: Collection[str]) -> frozenset[str]:
    """Those of the new tokens that a dataset writes: a chat template's own source does not name them."""
    return frozenset(token for token in tokens if not any(token in source for source in templates))


@dataclass(frozen=True, slots=True)
class _Known:
    """What a tokenizer has."""

    ids: Mapping[str, int]
    following: int
    """The id that the next added token gets: the `tokenizers` library counts on from the end of the vocabulary."""


def _known(folder: Path) -> _Known:
    path = folder / TOKENIZER
    if not path.is_file():
        raise DataError(
            f"{FIELD}: {folder} has no {TOKENIZER}, to which tokens could be added; make it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    config = folder / "tokenizer_config.json"
    return _read_known(folder, *(path.stat().st_mtime_ns if path.is_file() else 0 for path in (path, config)))


@lru_cache(maxsize=4)
def _read_known(folder: Path, *_changed: int) -> _Known:
    made = _read(folder / TOKENIZER)
    vocabulary = (made.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
    added = {token["content"]: int(token["id"]) for token in made.get("added_tokens") or ()}
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added |= {token["content"]: int(number) for number, token in decoder.items()}
    return _Known({**vocabulary, **added}, max(len(vocabulary), *(number + 1 for number in added.values()), 0))


def _declared(config: dict[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """A file's content with the tokens in its list of further special tokens."""
    name = next((name for name in _LISTS if isinstance(config.get(name), list)), _LISTS[1])
    return {**config, name: [*(config.get(name) or ()), *tokens]}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise DataError(f"model.tokenizer: {path} is not valid JSON ({e}); download it again") from e
    if not isinstance(found, dict):
        raise DataError(f"model.tokenizer: {path} is no JSON object; download it again")
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    from megabatch.converters.atomic import replacing  # needs xxhash, which planning does without

    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
