"""How many samples, items and tokens runs have counted, kept beside the token caches for plans. No numpy, no torch.

`.counts.json` in the cache folder holds an entry for each set of data and settings. Planning reads neither tokenizer
nor data, so the key of an entry is made of the settings in run.json that decide samples and packs, and of the sizes
and times of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabatch.config.declare import parameters
from megabatch.config.recipe import Recipe
from megabatch.config.run import RunConfig
from megabatch.data.rows import names
from megabatch.data.rows.preprocess import source_of
from megabatch.errors import ConfigError, DataError
from megabatch.run_directory import write_atomic
from megabatch.values import dataclass

NAME = ".counts.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCounts:
    """How much training data a run has."""

    samples: int
    items: int
    """Packs, or samples if the run does not pack."""
    tokens: int
    cache: str
    """The token cache in which they were counted."""


def remember_counts(run: RunConfig, cache_folder: Path, found: DataCounts) -> None:
    """Saves the counts if the folder is writable; drops entries whose cache is gone."""
    with contextlib.suppress(OSError, DataError):
        kept = {name: one for name, one in _entries(cache_folder).items() if Path(str(one.get("cache"))).is_dir()}
        kept[_request(run)] = asdict(found)
        write_atomic(cache_folder / NAME, json.dumps(kept, indent=1))


def recall_counts(run: RunConfig, cache_folder: Path) -> DataCounts | None:
    """The saved counts of exactly this data, if its token cache still exists."""
    try:
        found = DataCounts(**_entries(cache_folder)[_request(run)])
        meta = json.loads((Path(found.cache) / "meta.json").read_bytes())
        return found if meta["samples"] >= found.samples > 0 else None
    except (OSError, ValueError, TypeError, KeyError, ConfigError, DataError):
        return None


def _entries(cache_folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((cache_folder / NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _request(run: RunConfig) -> str:
    """The key of a run's entry. Raises: OSError, DataError for files that cannot be found."""
    recipe = run.recipe
    decides = [one.name for one in parameters(Recipe) if one.group == "data" and not one.facts.speed_only]
    settings = {name: getattr(recipe.data, name) for name in decides}
    if recipe.data.preprocess is not None:
        settings["preprocess"] = source_of(recipe.data.preprocess)
    given = recipe.model
    model = [given.model, given.tokenizer, run.shape.model_type, run.shape.vocab_size, *given.new_special_tokens]
    decisive = [recipe.task, settings, model, recipe.training.seed, recipe.bridge.use_hf, list(_states(run))]
    text = json.dumps(decisive, sort_keys=True, default=dict)  # read-only mappings
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _states(run: RunConfig) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of every file of the data and of the tokenizer."""
    data, tokenizer = run.recipe.data, run.recipe.model.tokenizer
    for text in (*data.dataset, *data.val_dataset):
        name = names.parse(text, use_hf=run.recipe.bridge.use_hf)
        yield from map(_state, names.local_files(name) if name.kind == "path" else ())
    if tokenizer is not None and Path(tokenizer).is_dir():
        yield from (_state(p) for p in sorted(Path(tokenizer).iterdir()) if p.is_file() and p.suffix not in _WEIGHTS)


def _state(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns
