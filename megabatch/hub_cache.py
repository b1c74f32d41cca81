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


def download_command(name: str, *, use_hf: bool, revision: str | None = None) -> str:
    """The command that downloads a hub's model into its client's cache."""
    command = f"hf download {name}" if use_hf else f"modelscope download --model {name}"
    return command if revision is None else f"{command} --revision {revision}"


def cached_folder(
    name: str, *, use_hf: bool, revision: str | None = None, environment: Mapping[str, str] | None = None
) -> Path | None:
    """The downloaded folder of a hub's model, or None; we look in the cache of the configured hub first.

    Args: revision: branch, tag or commit, which only Hugging Face's cache tells apart; None: the newest;
    environment: variables that locate the clients' caches; by default this process's.
    """
    places = os.environ if environment is None else environment
    found = _hugging_face(name, places, revision or "main"), iter(()) if revision else _modelscope(name, places)
    for folders in found if use_hf else reversed(found):
        for folder in folders:
            if (folder / "config.json").is_file():
                return folder
    return None


def _hugging_face(name: str, environment: Mapping[str, str], revision: str) -> Iterator[Path]:
    """`hub/models--org--name/snapshots/<commit>`, with the commit of a branch or tag in `refs/`."""
    home = Path(environment.get("HF_HOME") or _caches(environment) / "huggingface")
    hub = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    if commit and "/" not in commit:
        yield repository / "snapshots" / commit


def _modelscope(name: str, environment: Mapping[str, str]) -> Iterator[Path]:
    """`[hub/][models/]org/name`, depending on the client's version; dots in a name become `___`."""
    cache = Path(environment.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    for base in (cache / "hub" / "models", cache / "models", cache / "hub", cache):
        yield base / name.replace(".", "___")
        yield base / name


def _caches(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
