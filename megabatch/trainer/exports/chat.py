"""The tokenizer of an exported folder: the one that was trained with, its chat template, and where answers end.

What `apply_chat_template` gives in the exported folder is what the model was trained on, and `generate` stops where
the template ends the assistant's turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from megabatch.converters.atomic import replacing
from megabatch.converters.auxiliary_files import carry_over, carry_tokenizer, tokenizer_files
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError

_GENERAL, _GENERAL_IN_5 = "PreTrainedTokenizerFast", "TokenizersBackend"
"""The class that does what tokenizer.json says, by the name that all releases of transformers know, and by its own
since transformers 5."""
_TEMPLATES = ("chat_template.*", "additional_chat_templates/*")


@dataclass(frozen=True, slots=True)
class ChatExport:
    """The tokenizer and the chat template of a run."""

    tokenizer: Path
    template: str | None
    """`data.template`."""
    has_turns: bool
    """False where no template is rendered: in pretraining, and for texts whose tokenizer has none."""
    padding: str | None = None
    """The token that fills batches; None leaves the tokenizer's own."""

    def write(self, config_folder: Path, directory: Path) -> None:
        """Writes the auxiliary files of both folders, without config.json. Raises: MegabatchError, OSError."""
        chat = _chat(self.tokenizer, self.template) if self.has_turns else _Chat(None, None)
        dropped = _templates(self.tokenizer) if chat.source is not None else []
        carry_over(config_folder, directory, skip=("config.json", *tokenizer_files(config_folder)))
        carry_tokenizer(self.tokenizer, directory, skip=dropped)
        if chat.source is not None:
            _write_template(directory, chat.source)
        if self.padding is not None and tokenizers.load(self.tokenizer).pad_token != self.padding:
            _write_padding(directory, self.padding)
        if chat.end is not None:
            _write_end(config_folder, directory, chat.end)

    def keep_class(self, directory: Path) -> None:
        """For a folder without config.json: lets transformers read its tokenizer as the run's, beside config.json."""
        path, trained = directory / "tokenizer_config.json", _class_of(self.tokenizer)
        config = _read(path)
        if _in_transformers_5(config.get("tokenizer_class") or _GENERAL) != trained:
            _write(path, {**config, "tokenizer_class": _GENERAL if trained == _GENERAL_IN_5 else trained})


class _Chat(NamedTuple):
    source: str | None
    """The template's text, if the tokenizer's own files do not include it."""
    end: int | None
    """Token that ends an assistant's turn."""


@lru_cache(maxsize=1)
def _chat(tokenizer: Path, name: str | None) -> _Chat:
    template = Template(tokenizers.load(tokenizer), name=name)
    end = template.turn_end()
    number = None if end is None else template.tokenizer.convert_tokens_to_ids(end)
    return _Chat(None if template.is_own else template.sources["default"], number)


@lru_cache(maxsize=1)
def _class_of(tokenizer: Path) -> str:
    return _in_transformers_5(type(tokenizers.load(tokenizer)).__name__)


def _in_transformers_5(name: str) -> str:
    return _GENERAL_IN_5 if name == _GENERAL else name.removesuffix("Fast")


def has_template(tokenizer: Path, name: str | None) -> bool:
    """Whether conversations can be rendered; rows that may be plain texts need no template."""
    try:
        _chat(tokenizer, name)
    except DataError:
        return False
    return True


def _templates(folder: Path) -> list[str]:
    return [name for name in tokenizer_files(folder) if any(fnmatch(name, pattern) for pattern in _TEMPLATES)]


def _write_template(directory: Path, source: str) -> None:
    """Writes the template to both possible places: its own file, which wins, and the config for older readers."""
    with replacing(directory / "chat_template.jinja") as file:
        file.write(source.encode())
    config = _read(directory / "tokenizer_config.json")
    _write(directory / "tokenizer_config.json", {**config, "chat_template": source})


def _write_padding(directory: Path, token: str) -> None:
    """Sets the tokenizer's padding in the files that say it, of which older ones win in some versions."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (directory / name).is_file():
            _write(directory / name, {**_read(directory / name), "pad_token": token})


def _write_end(config_folder: Path, directory: Path, end: int) -> None:
    """Lets `generate` stop at the end of a turn besides where it stopped before."""
    path = directory / "generation_config.json"
    known = _read(path)
    model = _read(config_folder / "config.json")
    stops = known.get("eos_token_id", model.get("eos_token_id"))
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    if end in stops:
        return
    if not path.is_file():
        known = {name: model[name] for name in ("bos_token_id", "pad_token_id") if model.get(name) is not None}
    _write(path, {**known, "eos_token_id": [end, *stops] if stops else end})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_bytes())
    except ValueError as e:
        raise DataError(f"{path} is not valid JSON ({e}); copy it again") from e
    return read if isinstance(read, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
