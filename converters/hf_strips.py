"""Rows of a Hugging Face folder's tensors as byte extents with their scales, as every plan that reads one has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megabatch.converters.bijection import FLOATS
from megabatch.converters.engine.plan import Numbered, Scales, Strip
from megabatch.converters.hf_model import HfModel
from megabatch.converters.mapping import Mapped, Piece, elements
from megabatch.converters.quantised import PLAIN
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError


def plain_dtype(dtype: str) -> str:
    """What a tensor of this dtype is written as when nothing else is asked for."""
    return dtype if dtype in FLOATS else PLAIN


def strip_of(model: HfModel, piece: Piece, row: int, row_bytes: int, numbered: Numbered) -> Strip:
    """A piece, which gives the rows of the target from `row` on."""
    path, start, _ = model.folder.extent(piece.hf)
    first = piece.rows[0] + _rows_before(model, piece)
    scales = _scales(model, piece, first, numbered)
    return Strip(row, piece.count, numbered.number(path), start + first * row_bytes, 0, row_bytes, scales)


def whole_strip(model: HfModel, mapped: Mapped, row_bytes: int, numbered: Numbered) -> Strip:
    """All of the one tensor, or of the one leading index of it, that a woven tensor is made of."""
    piece = next(mapped.pieces)
    path, start, _ = model.folder.extent(piece.hf)
    if model.quantised is not None and model.folder.info(piece.hf).dtype not in FLOATS:
        raise ConversionError(f"{piece.hf} is quantised and woven; this is not supported, entry {mapped.entry}")
    size = mapped.shape[0] * row_bytes
    return Strip(0, mapped.shape[0], numbered.number(path), start + (piece.index or 0) * size, 0, row_bytes)


def joined(strips: Iterable[Strip]) -> Iterator[Strip]:
    """Neighbours in the source as one; the strips follow one another in the target."""
    last: Strip | None = None
    for strip in strips:
        if last is not None and _follows(last, strip):
            last = last._replace(rows=last.rows + strip.rows)
            continue
        if last is not None:
            yield last
        last = strip
    if last is not None:
        yield last


def _follows(last: Strip, strip: Strip) -> bool:
    same = last.source == strip.source and strip.offset == last.offset + last.rows * last.width
    if last.scales is None or strip.scales is None:
        return same and last.scales is strip.scales
    return same and last.scales._replace(first=strip.scales.first) == strip.scales


def _rows_before(model: HfModel, piece: Piece) -> int:
    """Rows before a piece's leading index, in a tensor that holds all experts."""
    return 0 if piece.index is None else piece.index * model.folder.info(piece.hf).shape[1]


def _scales(model: HfModel, piece: Piece, first: int, numbered: Numbered) -> Scales | None:
    info = model.folder.info(piece.hf)
    if model.quantised is None or info.dtype in FLOATS:
        return None
    name = model.quantised.scales_of(piece.hf)
    path, offset, _ = model.folder.extent(name)
    dtype, shape = model.folder.info(name)
    if piece.index is not None:
        offset += piece.index * elements(shape[1:]) * ITEMSIZE[dtype]
        first -= _rows_before(model, piece)
    return Scales(numbered.number(path), offset, dtype, shape[-1], first, model.quantised.block)
