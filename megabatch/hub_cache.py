"""Finds models in the download caches of hub clients, without those clients."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Whether the name of a model or tokenizer looks like a hub's `organisation/name` and is not a local folder."""
    return bool(_HUB_NAME.fullmatch(name))


def download_command(name: str, *, use_hf: bool) -> str:
    """The command that downloads a hub's model into its client's cache."""
    return f"hf download {name}" if use_hf else f"modelscope download --model {name}"


def cached_folder(name: str, *, use_hf: bool, environment: Mapping[str, str] | None = None) -> Path | None:
    """The downloaded folder of a hub's model, or None; we look in the cache of the configured hub first.

    Args: environment: variables that locate the clients' caches; by default this process's.
    """
    finders = (_hugging_face, _modelscope) if use_hf else (_modelscope, _hugging_face)
    for find in finders:
        for folder in find(name, os.environ if environment is None else environment):
            if (folder / "config.json").is_file():
                return folder
    return None


def _hugging_face(name: str, environment: Mapping[str, str]) -> Iterator[Path]:
    """`hub/models--org--name/snapshots/<commit>`, with the commit in `refs/main`."""
    home = Path(environment.get("HF_HOME") or _caches(environment) / "huggingface")
    hub = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return
    yield repository / "snapshots" / commit


def _modelscope(name: str, environment: Mapping[str, str]) -> Iterator[Path]:
    """`[hub/][models/]org/name`, depending on the client's version; dots in a name become `___`."""
    cache = Path(environment.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    for base in (cache / "hub" / "models", cache / "models", cache / "hub", cache):
        yield base / name.replace(".", "___")
        yield base / name


def _caches(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
