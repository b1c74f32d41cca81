"""Dataset strings: what `data.dataset` may hold. Without numpy or torch, so that a launcher reads them too.

`path[#count]`, `[hf::|ms::]org/name[:subset[:split]][#count]` or `example:name[#count]`.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from megabatch.data.rows import files
from megabatch.errors import DataError
from megabatch.values import dataclass

EXAMPLES = (
    "arithmetic",
    "arithmetic_pairs",
    "arithmetic_labels",
    "arithmetic_steps",
    "arithmetic_ranked",
    "hasty_sums",
)
"""Datasets that megabatch generates, see `synthetic`."""

_COUNT = re.compile(r"#(\d+)$")
_HUB_NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(?::[\w./-]+){0,2}$")
_EXAMPLE = "example:"


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A parsed dataset string; a path need not exist."""

    text: str
    """As the user wrote it."""
    kind: Literal["path", "hf", "ms", "example"]
    where: str
    """The path, the hub's `org/name[:subset[:split]]`, or the example's name."""
    count: int | None = None

    def absolute(self) -> str:
        """The same dataset from any working directory."""
        if self.kind != "path":
            return self.text
        count = "" if self.count is None else f"#{self.count}"
        return f"{Path(self.where).expanduser().absolute()}{count}"


def parse(text: str, *, use_hf: bool = True) -> DatasetName:
    """Parses a dataset string; a name that could also be a hub's is a path if that path exists.

    Args: `use_hf`: which hub a name without `hf::` or `ms::` means (Hugging Face, else ModelScope).
    Raises: DataError for `#0` and for an example that does not exist.
    """
    where, count = text, None
    if match := _COUNT.search(text):
        where, count = text[: match.start()], int(match.group(1))
        if not count:
            raise DataError(f"dataset {text!r} requests #0 rows; drop the #0 or request at least one")
    if where.startswith("hf::"):
        return DatasetName(text, "hf", where[4:], count)
    if where.startswith("ms::"):
        return DatasetName(text, "ms", where[4:], count)
    if where.startswith(_EXAMPLE):
        return DatasetName(text, "example", _known_example(where.removeprefix(_EXAMPLE)), count)
    path = Path(where).expanduser()
    if _HUB_NAME.match(where) and not files.is_readable(path) and not path.exists():
        return DatasetName(text, "hf" if use_hf else "ms", where, count)
    return DatasetName(text, "path", where, count)


def local_files(name: DatasetName) -> list[Path]:
    """The files of a dataset that is a path, in reading order.

    Raises: DataError when it does not exist, with the nearest names, or holds no file that can be read.
    """
    path = Path(name.where).expanduser()
    if not path.exists():
        raise DataError(f"dataset {name.text!r} does not exist{files.nearest(path)}")
    if path.is_dir():
        return _files_in(path)
    if not files.is_readable(path):
        raise DataError(f"dataset {path} is not a {files.READABLE} file; convert or rename it")
    if not path.is_file():
        raise DataError(f"dataset {path} is a pipe, a socket or a device; write its rows to a regular file")
    return [path]


def _files_in(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and files.is_readable(p))
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not found:
        raise DataError(f"dataset folder {folder} has no {files.READABLE} file; check the path")
    return found


def _known_example(name: str) -> str:
    if name not in EXAMPLES:
        near = get_close_matches(name, EXAMPLES, n=1) or EXAMPLES
        raise DataError(
            f"dataset '{_EXAMPLE}{name}' is not one of megabatch's examples; try {_EXAMPLE}{' or '.join(near)}"
        )
    return name
