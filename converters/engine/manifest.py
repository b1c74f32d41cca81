"""`megabatch-manifest.json`: which plan made an output, its files' sizes, and the digests of verified bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabatch.converters.engine.plan import Plan
from megabatch.converters.regular_files import INDEX_BYTES, read_regular
from megabatch.errors import ConversionError

MANIFEST = "megabatch-manifest.json"
DIGEST_BYTES = 16
_VERSION = 1


def manifest(plan: Plan, hashes: Mapping[int, str], folder: Path) -> bytes:
    """Its text: every file that was made as consecutive ranges, one for each tensor.

    A range is [name, offset, bytes, digest], the digest null where nothing was verified. The files beside the
    tensors are all others in `folder`, whose digests are always taken.
    """
    ranges: list[list[Any]] = [[] for _ in plan.files]
    for number, tensor in enumerate(plan.tensors):
        ranges[tensor.file].append([tensor.name, tensor.offset, tensor.total, hashes.get(number) or None])
    for number, file in enumerate(plan.files):
        for name, offset, data in (("header", 0, file.head), ("end", file.size - len(file.tail), file.tail)):
            if data:
                ranges[number].append([name, offset, len(data), digest_of(data)])
    files = {
        file.name: {"size": file.size, "ranges": sorted(ranges[number], key=lambda entry: entry[1])}
        for number, file in enumerate(plan.files)
    }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in files and name != MANIFEST and not path.is_dir():
            size = path.stat().st_size
            files[name] = {"size": size, "ranges": [["all of it", 0, size, _digest_of_file(path)]]}
    made = {
        "version": _VERSION,
        "direction": plan.direction,
        "plan": plan.digest,
        "source": str(plan.source),
        "digest": f"blake2b-{8 * DIGEST_BYTES}",
        **({"lacks": list(plan.lacks)} if plan.lacks else {}),
        "files": files,
    }
    return (json.dumps(made, separators=(",", ":")) + "\n").encode()


def digest_of(data: bytes) -> str:
    """BLAKE2b in hexadecimal."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of an output, or None when it has none. Raises: ConversionError when it cannot be understood."""
    path = output / MANIFEST
    if not path.exists():
        return None
    try:
        made = json.loads(read_regular(path, most=INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(made, dict) or made.get("version") != _VERSION or not isinstance(made.get("files"), dict):
        raise ConversionError(f"{path}: is no manifest that this version of megabatch wrote")
    return made


def is_of(output: Path, plan: Plan) -> bool:
    """Whether an output is the finished result of this plan."""
    found = read_manifest(output) if output.is_dir() else None
    return found is not None and found.get("plan") == plan.digest
