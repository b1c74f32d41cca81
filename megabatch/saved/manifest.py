"""`megabatch-manifest.json` of a checkpoint: its files, their sizes, and digests taken while they were written.

    {"version": 1, "digest": "xxh3-64",
     "files": {"mcore/__0_0.distcp": {"size": …, "ranges": [[name, offset, bytes, digest], …]}, …},
     "own": the same digest of all that is before this key}

The converters' manifests have the same form, with BLAKE2b digests. The ranges of a file cover it without gaps. A
`.distcp` has one range per item that `.metadata` names, so that a rank checks exactly the bytes that it loads; a
safetensors file has one for its header and at least one per tensor; any other file is one range.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from megabatch.errors import CheckpointError
from megabatch.values import dataclass

MANIFEST = "megabatch-manifest.json"
WHOLE = "all of it"
"""Name of the range of a single-range file."""
_VERSION = 1
_OURS = "xxh3-64"
_OWN = ',"own":"{}"}}\n'
_OWN_BYTES = len(_OWN.format("0" * 16))


class DamagedError(CheckpointError):
    """A checkpoint differs from what was saved; the message begins with the file."""


class UnreadableError(CheckpointError):
    """A checkpoint whose bytes a disk, a network or permissions withhold: it may be intact, and be read elsewhere."""

    @staticmethod
    def of(path: Path, error: OSError) -> UnreadableError:
        return UnreadableError(f"{path} cannot be read: {error.strerror or error}")


class Digest(Protocol):
    """Hashes bytes part by part."""

    def update(self, data: memoryview | bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def _xxh3() -> Digest:
    from xxhash import xxh3_64  # a plan computes no digest, and needs only the standard library

    digest: Digest = xxh3_64()
    return digest


def _hexdigest(data: bytes) -> str:
    digest = _xxh3()
    digest.update(data)
    return digest.hexdigest()


_ALGORITHMS: Mapping[str, Callable[[], Digest]] = {
    _OURS: _xxh3,
    "blake2b-128": lambda: hashlib.blake2b(digest_size=16),
}


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive bytes of a file."""

    name: str
    """Name for messages, such as a tensor's name."""
    offset: int
    size: int
    digest: str | None
    """Hexadecimal; None if not computed."""


@dataclass(frozen=True, slots=True)
class File:
    """A file whose ranges are sorted by offset."""

    size: int
    ranges: tuple[Range, ...]

    @staticmethod
    def of(data: bytes) -> File:
        """A file that is written in one go."""
        return File(len(data), (Range(WHOLE, 0, len(data), _hexdigest(data)),))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a folder when it was saved."""

    folder: Path
    """Names of files are relative to it."""
    algorithm: str
    files: Mapping[str, File]

    def digest(self) -> Digest:
        return _ALGORITHMS[self.algorithm]()

    def below(self, part: str) -> dict[str, File]:
        """The files in one of its folders, by their names with it."""
        return {name: file for name, file in self.files.items() if name.startswith(f"{part}/")}

    def require(self, name: str, data: bytes) -> None:
        """Checks the content of a single-range file. Raises: DamagedError."""
        file = self.files.get(name)
        if file is None:
            raise DamagedError(f"{name}: is not in {MANIFEST}")
        if len(data) != file.size:
            raise DamagedError(f"{name}: has {len(data)} bytes instead of {file.size}")
        digest = self.digest()
        digest.update(data)
        self.require_digest(name, file.ranges[0], digest)

    def require_digest(self, name: str, part: Range, digest: Digest) -> None:
        """Checks a range by the digest of its bytes; accepts a range without one. Raises: DamagedError."""
        if part.digest is not None and digest.hexdigest() != part.digest:
            what = "it" if part.name == WHOLE else part.name
            raise DamagedError(f"{name}: {what} differs from its digest")


def manifest_text(files: Mapping[str, File]) -> str:
    """The text of a manifest with XXH3 digests."""
    plain = {
        name: {"size": file.size, "ranges": [[r.name, r.offset, r.size, r.digest] for r in file.ranges]}
        for name, file in sorted(files.items())
    }
    text = json.dumps({"version": _VERSION, "digest": _OURS, "files": plain}, separators=(",", ":"))[:-1]
    return text + _OWN.format(_hexdigest(text.encode()))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder, None when there is none. Raises: DamagedError when it cannot be understood."""
    try:
        raw = read_file(folder / MANIFEST, MANIFEST)
        made = json.loads(raw)
        if made["digest"] == _OURS and raw[-_OWN_BYTES:].decode() != _OWN.format(_hexdigest(raw[:-_OWN_BYTES])):
            raise ValueError("it differs from its own digest")
        if made["version"] != _VERSION or made["digest"] not in _ALGORITHMS:
            raise ValueError(f"version {made['version']} with digests {made['digest']!r}")
        return Manifest(folder, made["digest"], {name: _file(name, file) for name, file in made["files"].items()})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedError(f"{MANIFEST}: is not valid ({e})") from e


def read_file(path: Path, name: str) -> bytes:
    """A whole file of a checkpoint. Args: name: of the file, for messages.

    Raises: FileNotFoundError, NotADirectoryError; DamagedError for a folder, a pipe or a link to itself, which stands
    in the file's place; UnreadableError.
    """
    if size_of(path) is None:  # reading a pipe would block
        raise DamagedError(f"{name}: is not a file")
    try:
        return path.read_bytes()
    except OSError as e:
        raise UnreadableError.of(path, e) from e


def size_of(path: Path) -> int | None:
    """Bytes of a file; None for anything else. Raises: as `read_file`, but for DamagedError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as e:
        if e.errno == errno.ELOOP:
            return None
        raise UnreadableError.of(path, e) from e
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _file(name: str, made: Mapping[str, Any]) -> File:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} is not a file of this folder")
    ranges = tuple(Range(*entry) for entry in made["ranges"])
    end = 0
    for part in ranges:
        if part.offset != end:
            raise ValueError(f"{name} has a gap at byte {end}")
        end += part.size
    if end != made["size"]:
        raise ValueError(f"{name} ends at byte {end}")
    return File(made["size"], ranges)


def missing_or_resized(manifest: Manifest, names: Iterable[str]) -> Iterator[str]:
    """Faults of these files that names and sizes show, one line each. Raises: UnreadableError."""
    for name in names:
        try:
            size = size_of(manifest.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            yield f"{name}: is missing"
            continue
        if size is None:
            yield f"{name}: is not a file"
        elif size != manifest.files[name].size:
            yield f"{name}: has {size} bytes instead of {manifest.files[name].size}"


def left_over(manifest: Manifest) -> Iterator[str]:
    """Files in a run's checkpoint that did not exist when it was saved, one line each; people may add some to a model
    that was converted."""
    if manifest.algorithm != _OURS:
        return
    for path in sorted(manifest.folder.rglob("*")):
        name = path.relative_to(manifest.folder).as_posix()
        if name not in manifest.files and name != MANIFEST and not path.is_dir():
            yield f"{name}: does not belong to this checkpoint"
