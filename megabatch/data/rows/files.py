"""Local dataset files → rows with their place: JSONL, JSON, CSV, TSV, Parquet, plain text, also compressed."""

from __future__ import annotations

import codecs
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from megabatch.data.rows import strict_json
from megabatch.data.rows.compressed import COMPRESSIONS, inner_suffix, is_damage, open_bytes
from megabatch.data.rows.strict_json import JsonError
from megabatch.errors import DataError
from megabatch.values import dataclass

_LOOKED_AT = 10_000
"""Paths below a folder, for one that is a dataset."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row comes from, for error messages."""

    file: str
    number: int
    """Line from 1 (JSONL, CSV, TSV, text) or row from 0 (JSON list, Parquet, hub)."""
    is_line: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.is_line else f"{self.file}[row {self.number}]"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a dataset."""

    origin: Origin
    fields: dict[str, Any]


class Line(NamedTuple):
    """An unparsed row of a JSONL file: parsing is most of the cost of reading, and another process can do it."""

    file: str
    number: int
    """From 1."""
    raw: bytes


def rows(path: Path) -> Iterator[Row]:
    """Rows of one file, streamed. Raises DataError with file and line for anything unreadable."""
    return map(parsed, unparsed(path))


def unparsed(path: Path) -> Iterator[Row | Line]:
    """The same rows, but lines of JSONL unparsed; pass each to `parsed`."""
    try:
        yield from _READERS[inner_suffix(path)](path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); check the path and its permissions") from e


def parsed(row: Row | Line) -> Row:
    """Parses a row. Raises: DataError with file and line for text that is not UTF-8, not JSON or not an object."""
    if isinstance(row, Row):
        return row
    return _json_row(row.file, row.number, _decoded(row.file, row.number, row.raw))


def is_readable(path: Path) -> bool:
    """Whether the file name is that of a supported dataset file; Parquet has its own compression."""
    suffix = inner_suffix(path)
    return suffix in _READERS and (suffix != ".parquet" or path.suffix.lower() == suffix)


def without_nulls(value: Any) -> Any:
    """Objects without their null keys, at any depth.

    In a column of structs, every row has the keys of all rows, with null for those it did not have.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def content_digest(path: Path) -> bytes:
    """blake2b digest of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); check the path and its permissions") from e


def nearest(path: Path) -> str:
    """` ; ...` clause that names the nearest datasets (files that can be read, and folders of them), for a path that
    does not exist. Texts, which most folders have, are named in the place of a text alone."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f": there is no folder {folder}; check the path"
    inside = {p.name: p for p in folder.iterdir() if not p.name.startswith(".")}
    files = sorted(name for name, p in inside.items() if is_readable(p) and p.is_file())
    readable = [name for name in files if inner_suffix(path) == ".txt" or inner_suffix(inside[name]) != ".txt"]
    folders = [name for name, p in inside.items() if p.is_dir()]
    near = get_close_matches(path.name, [*readable, *folders], n=6, cutoff=0.5)
    close = [name for name in near if name in readable or _holds_rows(inside[name])][:3] or readable[:3]
    if close:
        return f"; nearest in {folder}: {', '.join(close)}"
    return "; check the path" if files else f"; {folder} has no {READABLE} file; check the path"


def _holds_rows(folder: Path) -> bool:
    """Whether a file that can be read is among the first that lie in a folder."""
    return any(is_readable(p) and p.is_file() for p in islice(folder.rglob("*"), _LOOKED_AT))


def _lines(path: Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, decoded as UTF-8 (a byte order mark is dropped), `blank` ones only if asked."""
    for number, raw in _raw_lines(path):
        line = _decoded(str(path), number, raw)
        if blank or line.strip():
            yield number, line


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw
    except (OSError, EOFError, zlib.error) as e:
        if not is_damage(e):
            raise
        raise DataError(
            f"{path}:{number + 1}: the compressed file is damaged or truncated there ({e}); copy or download it again"
        ) from e


def _decoded(file: str, number: int, raw: bytes) -> str:
    if number == 1 and (other := _other_encoding(raw)):
        raise DataError(f"{file}: is {other}, not UTF-8; convert the file: iconv -f {other} -t UTF-8")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file}:{number}: not UTF-8 (byte 0x{raw[e.start]:02x} at column {e.start + 1}); "
            f"fix that line or convert the file, e.g. iconv -f latin1 -t utf-8"
        ) from e


def _other_encoding(raw: bytes) -> str | None:
    """The encoding of a text that starts with these bytes, if not UTF-8: by byte order mark or zero bytes."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, name in marks.items():  # UTF-32's begins with UTF-16's
        if raw.startswith(mark):
            return name
    if raw[:4:2] == b"\0\0":
        return "UTF-16BE"
    return "UTF-16LE" if raw[1:4:2] == b"\0\0" else None


def _jsonl(path: Path) -> Iterator[Line]:
    file = str(path)
    for number, raw in _raw_lines(path):
        if raw[:1] == b"{" or _decoded(file, number, raw).strip():
            yield Line(file, number, raw)


def _json_row(file: str, number: int, line: str) -> Row:
    try:
        fields = strict_json.loads(line.rstrip())
    except JsonError as e:
        raise DataError(f"{file}:{number}: not valid JSON ({e}); fix or delete that line") from e
    return Row(Origin(file, number), _object(fields, file, number))


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, read as a whole; or one object per line, since some tools name JSONL so."""
    lines = _lines(path)
    first = next(lines, None)
    if first is None or not _is_object(first[1]):
        yield from _json_list(path, "".join(line for _, line in _lines(path, blank=True)))
    else:
        yield from (_json_row(str(path), number, line) for number, line in chain([first], lines))


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line, parse_int=float), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _json_list(path: Path, text: str) -> Iterator[Row]:
    try:
        records = strict_json.loads(text)
    except JsonError as e:
        raise DataError(
            f"{path}: not valid JSON ({e}); fix it: a .json dataset is a list of objects, or one object per line"
        ) from e
    if not isinstance(records, list):
        raise DataError(
            f"{path}: holds a {type(records).__name__}; a .json dataset is a list of objects, or one object per line"
        )
    for number, fields in enumerate(records):
        yield Row(Origin(str(path), number, is_line=False), _object(fields, str(path), number, is_line=False))


def _csv(path: Path, *, delimiter: str = ",") -> Iterator[Row]:
    import csv

    csv.field_size_limit(1 << 30)  # the default of 128 KiB refuses long documents
    reader = csv.DictReader((line for _, line in _lines(path, blank=True)), strict=True, delimiter=delimiter)
    try:
        header = reader.fieldnames or ()
        if twice := [name for name, count in Counter(header).items() if name and count > 1]:
            raise DataError(f"{path}:1: the header has the column {twice[0]!r} twice; rename or remove one of them")
        for fields in reader:
            if None in fields or None in fields.values():
                raise DataError(
                    f"{path}:{reader.line_num}: must have the header's {len(header)} cells; "
                    f"quote cells that contain {'tabs' if delimiter == _TAB else 'commas'}"
                )
            yield Row(Origin(str(path), reader.line_num), fields)
    except csv.Error as e:
        raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV ({e}); fix the quoting of that line") from e


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Row(Origin(str(path), number, is_line=False), without_nulls(fields))
                    number += 1
    except pa.ArrowException as e:
        raise DataError(f"{path}: not readable as Parquet near row {number} ({e}); write the file again") from e


def _text(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield Row(Origin(str(path), number), {"text": line.rstrip("\r\n")})


def _object(fields: Any, file: str, number: int, *, is_line: bool = True) -> dict[str, Any]:
    if not isinstance(fields, dict):
        place, kind = Origin(file, number, is_line), type(fields).__name__
        raise DataError(f"{place}: is a JSON {kind}; each row must be an object with named fields")
    return fields


_TAB = "\t"
_READERS: dict[str, Callable[[Path], Iterator[Row] | Iterator[Line]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter=_TAB),
    ".parquet": _parquet,
    ".txt": _text,
}
READABLE = f"{', '.join(_READERS)} (the text ones also with {' or '.join(COMPRESSIONS)})"
"""The kinds of files, for error messages."""
