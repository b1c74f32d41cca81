"""The files of a Hugging Face folder besides its weights: configs, tokenizer, chat template, code, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megabatch.converters.atomic import replacing
from megabatch.converters.dtypes import TORCH
from megabatch.converters.regular_files import read_regular
from megabatch.converters.safetensors_io.header import parse_object
from megabatch.errors import ConversionError

_OF_THE_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*", "*.tiktoken", "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
CARRIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "configuration.json", *_OF_THE_TOKENIZER,
    "*.py", "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""Names of the files that make a folder of weights usable, as shell patterns."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def auxiliary_files(folder: Path) -> list[Path]:
    """The carried files of a folder, relative to it, never weights."""
    found = [path for pattern in ("*", "additional_chat_templates/*") for path in folder.glob(pattern)]
    names = sorted(path.relative_to(folder) for path in found if path.is_file())
    return [
        name
        for name in names
        if not name.name.endswith(_WEIGHTS) and any(fnmatch(name.as_posix(), pattern) for pattern in CARRIED)
    ]


def tokenizer_files(folder: Path) -> list[str]:
    """Names of those that belong to the folder's tokenizer."""
    names = [path.as_posix() for path in auxiliary_files(folder)]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _OF_THE_TOKENIZER)]


def carry_tokenizer(source: Path, target: Path, *, skip: Collection[str] = ()) -> None:
    """Copies the files of a folder's tokenizer, as `carry_over` does."""
    others = {path.as_posix() for path in auxiliary_files(source)} - {*tokenizer_files(source)}
    carry_over(source, target, skip=(*others, *skip))


def carry_over(source: str | os.PathLike[str], target: str | os.PathLike[str], *, skip: Collection[str] = ()) -> None:
    """Copies the auxiliary files from one folder to another, each written under a temporary name and renamed.

    Follows links (a hub cache consists of links). `skip` names files that the caller writes itself.
    Raises: ConversionError naming the file that could not be copied.
    """
    from_folder, to_folder = Path(source), Path(target)
    for name in auxiliary_files(from_folder):
        if name.as_posix() not in skip:
            _copy(from_folder / name, to_folder / name)


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as reader, replacing(target) as writer:
            shutil.copyfileobj(reader, writer)
    except OSError as error:
        raise ConversionError(f"{error.filename or target}: cannot be carried over: {error.strerror}") from error


def replaced_config(
    folder: Path, *, dtype: str | None, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, bytes]:
    """config.json for weights of another `dtype` (safetensors' name), with other values for the keys in `changes`; a
    key is left out where its value is None.

    Empty if the folder's own file is already right.
    """
    if dtype is None and not changes:
        return {}
    path = folder / "config.json"
    config = parse_object(read_regular(path), path, what="config") | dict(changes)
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = TORCH[dtype]
    return {path.name: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
