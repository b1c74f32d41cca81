"""Checks what a conversion reads against its source's digests."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megabatch.converters.engine.plan import Plan, Strip
from megabatch.errors import CheckpointError, ConversionError
from megabatch.saved.check import damaged_parts, jobs
from megabatch.saved.manifest import MANIFEST, File, Manifest, read_manifest

_SHOWN = 8


def check_sources(plan: Plan, numbers: Sequence[int], *, workers: int) -> None:
    """Checks the source tensors of these tensors of a plan, if the source's manifest has digests.

    A checkpoint's manifest lies in its folder or the one above (`step_<n>` of `mcore/` and `hf/`).
    Raises: ConversionError naming the damaged parts.
    """
    paths = [source.path for source in plan.sources]
    check_strips(paths, (strip for number in numbers for strip in _strips(plan, number)), workers=workers)


def check_strips(paths: Sequence[Path], strips: Iterable[Strip], *, workers: int) -> None:
    """The same for the tensors that these strips are of. Args: paths: the source files by their numbers.

    Raises: as `check_sources`.
    """
    offsets: dict[int, set[int]] = {}
    for strip in strips:
        offsets.setdefault(strip.source, set()).add(strip.offset)
    manifests: dict[Path, Manifest | None] = {}
    parts: dict[Path, dict[str, list[int]]] = {}
    for source, starts in offsets.items():
        path = paths[source]
        if path.parent not in manifests:
            manifests[path.parent] = _manifest(path.parent)
        manifest = manifests[path.parent]
        name = "" if manifest is None else path.relative_to(manifest.folder).as_posix()
        if manifest is not None and name in manifest.files:
            parts.setdefault(path.parent, {})[name] = _ranges(manifest.files[name], starts)
    for folder, named in parts.items():
        manifest = manifests[folder]
        assert manifest is not None
        _require_intact(manifest, named, workers=workers)


def check_folder(folder: Path, *, share: int = 0, of: int = 1, workers: int = 1) -> None:
    """The same for all weights in a folder, where several processes check a share each: number `share` of `of`.

    Its other files, which people edit, are not looked at.

    Raises: as `check_sources`.
    """
    if (manifest := _manifest(folder.absolute())) is None:
        return
    inner = folder.absolute().relative_to(manifest.folder).as_posix()
    files = manifest.files if inner == "." else manifest.below(inner)
    parts: dict[str, list[int]] = {}
    weights = [part for part in files.items() if part[0].endswith(".safetensors")]
    for name, numbers in [job for part in weights for job in jobs(*part)][share::of]:
        parts.setdefault(name, []).extend(numbers)
    _require_intact(manifest, parts, workers=workers)


def _require_intact(manifest: Manifest, parts: Mapping[str, Sequence[int]], *, workers: int) -> None:
    if faults := damaged_parts(manifest, parts, workers=workers):
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ConversionError("\n  ".join([f"{manifest.folder} is damaged", *faults[:_SHOWN], *more]))


def _strips(plan: Plan, number: int) -> Iterator[Strip]:
    tensor = plan.tensors[number]
    yield from tensor.strips
    for product in tensor.low_rank:
        yield from product.left.strips
        yield from product.right.strips


def _manifest(folder: Path) -> Manifest | None:
    for place in (folder, folder.parent):
        try:
            found = read_manifest(place)
        except CheckpointError as error:
            raise ConversionError(f"{place / MANIFEST}: {error}") from error
        if found is not None:
            return found
    return None


def _ranges(file: File, starts: set[int]) -> list[int]:
    """Numbers of the ranges that hold tensors which begin or go on at these bytes."""
    firsts = [part.offset for part in file.ranges]
    names = {file.ranges[bisect_right(firsts, start) - 1].name for start in starts}
    return [number for number, part in enumerate(file.ranges) if part.name in names]
