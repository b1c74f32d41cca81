"""The name of stored log-probabilities of a reference: a digest of everything that decides them.

| what | digest of |
| --- | --- |
| the samples | the token cache's digest of what it holds |
| the reference's weights | its files, a checkpoint's manifest, or the seed of a new model |
| the model | its shape, the type of its weights, and the settings of kernels, experts, precision and megatron-core |
| what is summed | `dpo.ld_alpha` |
| the libraries that compute | their versions |

A layout is not among them: another one rounds otherwise, and reads what the first one stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from megabatch.config.reference import reference_weights
from megabatch.config.run import RunConfig
from megabatch.converters.adapters.peft_folder import is_peft
from megabatch.data.rows.digests import Digests
from megabatch.data.run_tokenizer import folder_of
from megabatch.errors import DataError
from megabatch.saved.find import find_checkpoint, find_to_load
from megabatch.saved.manifest import MANIFEST

FORMAT = 1
"""Increase it when the same model and samples would give other numbers."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".json", ".metadata")
_NAMES = frozenset(("model", "tokenizer", "new_special_tokens"))
"""Fields of the recipe's model that say where it is, not what it computes; its vocabulary is part of the shape."""
_GROUPS = ("kernels", "moe", "mla", "precision", "fp8")
_LIBRARIES = ("torch", "megatron-core", "transformer-engine")


def reference_key(run: RunConfig, content: str, *, digests: Digests) -> str:
    """32 hexadecimal digits. Args: content: of the token cache, or of a part of it. Raises: MegabatchError."""
    recipe = run.recipe
    computed = {name: asdict(getattr(recipe, name)) for name in _GROUPS}
    computed["model"] = {name: value for name, value in asdict(recipe.model).items() if name not in _NAMES}
    task = run.task.name
    decides = [
        FORMAT,
        content,
        list(_weights(run, digests)),
        asdict(run.shape),
        computed,
        dict(recipe.training.megatron_extra_kwargs or {}),
        recipe.dpo.ld_alpha if task == "dpo" else None,
        {name: _version(name) for name in _LIBRARIES},
    ]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _weights(run: RunConfig, digests: Digests) -> Iterator[Any]:
    model, checkpoint, adapter = reference_weights(run.recipe)
    if checkpoint is not None:
        found = find_to_load(checkpoint, may_be_missing=not run.recipe.checkpoint.exit_on_missing_checkpoint)
        if found is not None:
            yield _folder(found.folder, digests)
    if (name := model or run.recipe.model.model) is not None:
        yield _folder(folder_of(name, run), digests)
    yield run.recipe.training.seed  # of a new model, or of what the model's folder lacks
    if adapter is not None:
        yield _folder(_adapter(Path(adapter).expanduser()), digests)


def _adapter(folder: Path) -> Path:
    """The files of an adapter, which may be named by its run: PEFT's folder, or a checkpoint."""
    return folder if is_peft(folder) else find_checkpoint(folder).folder


def _folder(folder: Path, digests: Digests) -> list[list[str]]:
    """Digests of the files with weights; a checkpoint's manifest has those of its files already."""
    manifest = folder / MANIFEST
    try:
        files = [manifest] if manifest.is_file() else sorted(_files(folder))
    except OSError as e:
        raise DataError(f"the reference in {folder} cannot be read: {e.strerror or e}") from e
    return [[path.name, digests.content(path).hex()] for path in files]


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and (path.suffix in _WEIGHTS or path.name == ".metadata"):
            yield path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
