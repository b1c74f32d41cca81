"""Where hubs' own clients keep what they downloaded, so that a model's folder is found without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megabatch.slurm.environment import SHARED_CACHES


def cached_folder(name: str, *, use_hf: bool, shared_cache: str | None = None) -> Path | None:
    """The downloaded folder of a hub's model, or None; the hub that the run uses is asked first.

    Args: `shared_cache`: a cluster profile's folder, which the job's own caches lie in.
    """
    finders = (_hugging_face, _modelscope) if use_hf else (_modelscope, _hugging_face)
    for find in finders:
        for folder in find(name, shared_cache):
            if (folder / "config.json").is_file():
                return folder
    return None


def _hugging_face(name: str, shared_cache: str | None) -> Iterator[Path]:
    """`hub/models--org--name/snapshots/<commit>`, with the commit in `refs/main`."""
    if shared_cache:
        homes = [_beneath(shared_cache, "HF_HOME") / "hub"]
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
        homes = [Path(os.environ.get("HF_HUB_CACHE") or home / "hub")]
    for hub in homes:
        repository = hub / f"models--{name.replace('/', '--')}"
        try:
            commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        yield repository / "snapshots" / commit


def _modelscope(name: str, shared_cache: str | None) -> Iterator[Path]:
    """`[hub/][models/]org/name`, by the client's version; dots in a name are written `___`."""
    if shared_cache:
        cache = _beneath(shared_cache, "MODELSCOPE_CACHE")
    else:
        cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    for base in (cache / "hub" / "models", cache / "models", cache / "hub", cache):
        yield base / name.replace(".", "___")
        yield base / name


def _beneath(shared_cache: str, variable: str) -> Path:
    """The folder that the job script gives that variable."""
    return Path(shared_cache) / next(preset.value for preset in SHARED_CACHES if preset.name == variable)
