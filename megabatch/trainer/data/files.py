"""Local dataset files → rows with their place: JSONL, JSON lists, CSV, Parquet and plain text."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.errors import DataError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands, for error messages."""

    file: str
    number: int
    """Line from 1 (JSONL, CSV, text) or row from 0 (JSON list, Parquet, hub)."""
    is_line: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.is_line else f"{self.file}[row {self.number}]"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a dataset."""

    origin: Origin
    fields: dict[str, Any]


def rows(path: Path) -> Iterator[Row]:
    """Rows of one file, streamed. Raises DataError with file and line for anything unreadable."""
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); check the path and its permissions") from e


def content_digest(path: Path) -> bytes:
    """blake2b digest of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); check the path and its permissions") from e


def nearest(path: Path) -> str:
    """` ; ...` clause that names the nearest existing files, for a path that does not exist."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f": there is no folder {folder}; check the path"
    names = [p.name for p in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not close:
        close = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)[:3]
    if close:
        return f"; nearest in {folder}: {', '.join(close)}"
    return f"; {folder} has no {', '.join(SUFFIXES)} file; check the path"


def _lines(path: Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, decoded as UTF-8 (a byte order mark is dropped), `blank` ones only if asked."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte 0x{raw[e.start]:02x} at column {e.start + 1}); "
                    f"fix that line or convert the file, e.g. iconv -f latin1 -t utf-8"
                ) from e
            if blank or line.strip():
                yield number, line


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            detail = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else "nested too deeply"
            raise DataError(f"{path}:{number}: not valid JSON ({detail}); fix or delete that line") from e
        yield Row(Origin(str(path), number), _object(fields, place=f"{path}:{number}"))


def _json(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path, blank=True))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(
            f"{path}: not valid JSON ({e.msg} near {text[max(0, e.pos - 20) : e.pos + 20]!r}); fix it, "
            f"or name the file .jsonl when it holds one object per line"
        ) from e
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}; a .json dataset must be a list of objects")
    for number, fields in enumerate(records):
        origin = Origin(str(path), number, is_line=False)
        yield Row(origin, _object(fields, place=str(origin)))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the default of 128 KiB refuses long documents
    reader = csv.DictReader((line for _, line in _lines(path, blank=True)), strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as e:
            raise DataError(
                f"{path}:{reader.reader.line_num}: not valid CSV ({e}); fix the quoting of that line"
            ) from e
        if fields is None:
            return
        if None in fields or None in fields.values():
            raise DataError(
                f"{path}:{reader.line_num}: has not the header's {len(reader.fieldnames or ())} cells; "
                f"quote cells that hold commas"
            )
        yield Row(Origin(str(path), reader.line_num), fields)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Row(Origin(str(path), number, is_line=False), fields)
                    number += 1
    except pa.ArrowException as e:
        raise DataError(f"{path}: not readable as Parquet near row {number} ({e}); write the file again") from e


def _text(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield Row(Origin(str(path), number), {"text": line.rstrip("\r\n")})


def _object(fields: Any, *, place: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: is a JSON {type(fields).__name__}; each row must be an object with named fields")
    return fields


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
SUFFIXES = tuple(_READERS)
