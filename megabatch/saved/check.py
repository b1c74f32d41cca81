"""Checks a checkpoint on disk against its digests: every byte against the manifest, some files at a time, a few
megabytes of each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from megabatch.saved.manifest import File, Manifest, left_over, missing_or_resized

_BUFFER_BYTES = 4 << 20
_AT_ONCE = 64 << 20
"""Bytes of ranges that a worker takes at once, so that one large file keeps all workers busy."""


def faults(manifest: Manifest, *, workers: int) -> list[str]:
    """Every difference from what was saved, one line each, starting with the file; uses 4 MiB of memory per worker."""
    names = [name for name in manifest.files if (manifest.folder / name).is_file()]
    absent = list(missing_or_resized(manifest, manifest.files))
    resized = {line.split(": ")[0] for line in absent}
    wanted = [job for name in names if name not in resized for job in jobs(name, manifest.files[name])]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(lambda job: _damaged(manifest, *job), wanted)
        return [*absent, *(line for lines in found for line in lines), *left_over(manifest)]


def damaged_parts(manifest: Manifest, parts: Mapping[str, Sequence[int]], *, workers: int) -> list[str]:
    """The same for only some ranges, given by their numbers in each file."""
    absent = list(missing_or_resized(manifest, parts))
    if absent:
        return absent
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(lambda name: _damaged(manifest, name, list(parts[name])), parts)
        return [line for lines in found for line in lines]


def jobs(name: str, file: File) -> Iterator[tuple[str, list[int]]]:
    """Numbers of the ranges to read together."""
    numbers: list[int] = []
    size = 0
    for number, part in enumerate(file.ranges):
        numbers.append(number)
        size += part.size
        if size >= _AT_ONCE:
            yield name, numbers
            numbers, size = [], 0
    if numbers:
        yield name, numbers


def _damaged(manifest: Manifest, name: str, numbers: list[int]) -> list[str]:
    path, lines = manifest.folder / name, []
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            for number in numbers:
                part = manifest.files[name].ranges[number]
                if part.digest is None:
                    continue
                if _digest(manifest, file.fileno(), part.offset, part.size, buffer) != part.digest:
                    lines.append(f"{name}: {part.name} differs from its digest")
    except OSError as e:
        lines.append(f"{name}: cannot be read: {e.strerror or e}")
    return lines


def _digest(manifest: Manifest, file: int, offset: int, size: int, buffer: memoryview) -> str:
    digest = manifest.digest()
    while size and (count := os.preadv(file, [buffer[:size]], offset)):
        digest.update(buffer[:count])
        offset, size = offset + count, size - count
    return digest.hexdigest()


def undigested(manifest: Manifest) -> bool:
    """Whether some ranges have no digest, as after a conversion without `--verify`."""
    return any(part.digest is None for file in manifest.files.values() for part in file.ranges)
