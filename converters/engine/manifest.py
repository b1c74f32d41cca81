"""`megabatch-manifest.json`: which plan made an output, its files' sizes, and the digests of verified bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megabatch.converters.engine.plan import Plan
from megabatch.errors import ConversionError

MANIFEST = "megabatch-manifest.json"
DIGEST_BYTES = 16
_VERSION = 1


def manifest(plan: Plan, hashes: dict[int, str]) -> bytes:
    """Its text: every file of tensors as consecutive ranges, one for each tensor.

    A range is [name, bytes, BLAKE2b digest of 16 bytes in hexadecimal, or null where nothing was verified].
    """
    ranges: list[list[Any]] = [[] for _ in plan.files]
    for number, tensor in enumerate(plan.tensors):
        ranges[tensor.file].append([tensor.name, tensor.offset, tensor.total, hashes.get(number) or None])
    files = {
        file.name: {"size": file.size, "tensors": sorted(ranges[number], key=lambda entry: entry[1])}
        for number, file in enumerate(plan.files)
    }
    made = {
        "version": _VERSION,
        "direction": plan.direction,
        "plan": plan.digest,
        "source": str(plan.source),
        "digest": f"blake2b-{8 * DIGEST_BYTES}",
        "files": files,
    }
    return (json.dumps(made, separators=(",", ":")) + "\n").encode()


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of an output, or None when it has none. Raises: ConversionError when it cannot be understood."""
    path = output / MANIFEST
    try:
        made = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(made, dict) or made.get("version") != _VERSION or not isinstance(made.get("files"), dict):
        raise ConversionError(f"{path}: is no manifest that this version of megabatch wrote")
    return made


def is_of(output: Path, plan: Plan) -> bool:
    """Whether an output is the finished result of this plan."""
    found = read_manifest(output) if output.is_dir() else None
    return found is not None and found.get("plan") == plan.digest
