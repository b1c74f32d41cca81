"""Verifies that an output matches its plan: bytes compared with the source's, or with the manifest's digests."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megabatch.converters.engine.manifest import DIGEST_BYTES, read_manifest
from megabatch.converters.engine.plan import Plan, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.engine.windows import BUFFER_BYTES, Windows
from megabatch.errors import ConversionError

_SHOWN = 8
_One = TypeVar("_One")
_Result = TypeVar("_Result")

Progress = Callable[[int], None]


class _Digest(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def compare(
    plan: Plan, numbers: Sequence[int], folder: Path, *, workers: int, progress: Progress = lambda _: None
) -> dict[int, str]:
    """Recomputes these tensors' bytes from the source and compares them with the files in `folder`.

    Returns the digest of each tensor's bytes, its frame with it.
    Raises: ConversionError naming the tensors that differ and the first byte that does.
    """
    _check_surroundings(plan, folder)

    def one(number: int, windows: Windows) -> tuple[int, str, str | None]:
        tensor = plan.tensors[number]
        path = folder / plan.files[tensor.file].name
        hashed, fault = _compared(tensor, windows, path)
        progress(tensor.data_bytes)
        return number, hashed, fault and f"{path}: {tensor.name} {fault}"

    with Sources(plan.sources) as sources:
        found = _in_threads(numbers, one, lambda: Windows(sources), workers)
    _raise([fault for _, _, fault in found if fault], f"{folder}: differs from its source")
    return {number: hashed for number, hashed, _ in found}


def _check_surroundings(plan: Plan, folder: Path) -> None:
    """Sizes of the files, and the bytes before and behind their tensors."""
    faults = []
    for file in plan.files:
        path = folder / file.name
        try:
            with open(path, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                head = opened.read(len(file.head))
                opened.seek(max(0, size - len(file.tail)))
                tail = opened.read()
        except OSError as error:
            faults.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if size != file.size:
            faults.append(f"{path}: has {size} bytes, the plan gives {file.size}")
        elif head != file.head or tail != file.tail:
            faults.append(f"{path}: its header is not the plan's")
    _raise(faults, f"{folder}: differs from its plan")


def _compared(tensor: Tensor, windows: Windows, path: Path) -> tuple[str, str | None]:
    """Digest of the file's bytes, and the fault if there is one."""
    digest: _Digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    frame, crc, fault = tensor.frame, 0, None
    with open(path, "rb", buffering=0) as file:
        before = _read(file.fileno(), tensor.offset, tensor.data_offset - tensor.offset, path)
        digest.update(before)
        at = tensor.data_offset
        for expected in windows.of(tensor):
            found = _read(file.fileno(), at, expected.nbytes, path)
            digest.update(found)
            wanted = bytes(expected)  # comparing a memoryview goes byte by byte
            if found != wanted and fault is None:
                first = next(i for i in range(len(found)) if found[i] != wanted[i])
                fault = f"{list(tensor.shape)} {tensor.dtype} differs from its source at byte {at + first}"
            if frame is not None:
                crc = zlib.crc32(expected, crc)
            at += expected.nbytes
        after = _read(file.fileno(), at, tensor.offset + tensor.total - at, path)
        digest.update(after)
    if fault is None and frame is not None and (before != frame.prefix(crc) or after != frame.suffix(crc)):
        fault = "has a damaged archive around it"
    return digest.hexdigest(), fault


def _read(file: int, offset: int, size: int, path: Path) -> bytes:
    parts = []
    while size:
        part = os.pread(file, size, offset)
        if not part:
            raise ConversionError(f"{path}: truncated at byte {offset}")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_manifest(output: Path, *, workers: int, progress: Progress = lambda _: None) -> int:
    """Compares an output with the digests of its own manifest; returns the bytes that were read.

    Raises: ConversionError naming damaged tensors, or saying that there are no digests.
    """
    made = read_manifest(output)
    if made is None:
        raise ConversionError(f"{output}: has no manifest to verify it by; give the flags that it was converted with")
    ranges = list(_ranges(output, made))
    if any(hashed is None for *_, hashed in ranges):
        raise ConversionError(
            f"{output}: its manifest has no digests, because it was converted without --verify; "
            "give the flags that it was converted with to compare it with its source"
        )

    def one(entry: tuple[Path, str, int, int, str | None], _: None) -> str | None:
        path, name, offset, size, expected = entry
        progress(size)
        return None if _digest_of(path, offset, size) == expected else f"{path}: {name} is damaged"

    _raise([fault for fault in _in_threads(ranges, one, lambda: None, workers) if fault], f"{output}: is damaged")
    return sum(size for _, _, _, size, _ in ranges)


def _ranges(output: Path, made: dict[str, Any]) -> Iterator[tuple[Path, str, int, int, str | None]]:
    try:
        for name, file in made["files"].items():
            path = output / name
            if ".." in path.parts or path.is_relative_to(output) is False:
                raise ValueError(f"{name} is not a file of this folder")
            size = path.stat().st_size
            if size != file["size"]:
                raise ConversionError(f"{path}: has {size} bytes, its manifest gives {file['size']}")
            for part, offset, length, hashed in file["ranges"]:
                yield path, part, offset, length, hashed
    except OSError as error:
        raise ConversionError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{output}: its manifest cannot be understood: {error!r}") from error


def _digest_of(path: Path, offset: int, size: int) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    buffer = memoryview(bytearray(min(size, BUFFER_BYTES)))
    with open(path, "rb", buffering=0) as file:
        while size:
            count = os.preadv(file.fileno(), [buffer[:size]], offset)
            if count == 0:
                raise ConversionError(f"{path}: truncated at byte {offset}")
            digest.update(buffer[:count])
            offset, size = offset + count, size - count
    return digest.hexdigest()


def _in_threads(
    items: Sequence[_One], one: Callable[[_One, Any], _Result], prepare: Callable[[], Any], workers: int
) -> list[_Result]:
    """`one(item, prepared)` for each item, prepared once in each worker."""
    waiting = iter(list(items))

    def work() -> list[_Result]:
        own = prepare()
        return [one(item, own) for item in waiting]

    with ThreadPoolExecutor(workers) as pool:
        return [result for part in [pool.submit(work) for _ in range(workers)] for result in part.result()]


def _raise(faults: Sequence[str], title: str) -> None:
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ConversionError("\n  ".join([title, *faults[:_SHOWN], *more]))
