"""Rows of Hugging Face tensors as byte extents with their scales, for every plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megabatch.converters.bijection import FLOATS
from megabatch.converters.engine.plan import Numbered, Scales, Strip
from megabatch.converters.hf_model import HfModel
from megabatch.converters.mapping import Mapped, Piece, elements
from megabatch.converters.mxfp4 import BLOCKS, SCALES, Mxfp4, packed_bytes
from megabatch.converters.quantised import PLAIN, Quantised
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError


def plain_dtype(dtype: str) -> str:
    """The dtype in which we write a tensor of this dtype by default."""
    return dtype if dtype in FLOATS else PLAIN


def strip_of(model: HfModel, piece: Piece, row: int, row_bytes: int, numbered: Numbered) -> Strip:
    """A piece, which gives the rows of the target from `row` on."""
    path, start, _ = model.folder.extent(piece.hf)
    first = piece.rows[0] + _rows_before(model, piece)
    scales = _scales(model, piece, first, numbered)
    return Strip(row, piece.count, numbered.number(path), start + first * row_bytes, 0, row_bytes, scales)


def read_dtype(model: HfModel, name: str) -> str:
    """dtype of a tensor after reading: for MXFP4 that of the dequantised blocks."""
    return PLAIN if _is_packed(model, name) else model.folder.info(name).dtype


class Strided(NamedTuple):
    """What a strided tensor is made of: all of its Hugging Face tensor, or of one leading index of it."""

    strips: tuple[Strip, ...]
    row_bytes: int
    """Of what the strips give."""
    packed: bool
    """Whether they give blocks of MXFP4, which `MadePlain` takes; else numbers."""


def strided(model: HfModel, mapped: Mapped, numbered: Numbered) -> Strided:
    """Raises: ConversionError for quantised weights that cannot be strided."""
    piece = next(mapped.pieces)
    rows, index = mapped.shape[0], piece.index or 0
    if _is_packed(model, piece.hf):
        widths = packed_bytes(mapped.shape[1])
        strips = []
        for suffix, left, width in zip((BLOCKS, SCALES), (0, widths[0]), widths, strict=True):
            path, start, _ = model.folder.extent(piece.hf + suffix)
            strips.append(Strip(0, rows, numbered.number(path), start + index * rows * width, left, width))
        return Strided(tuple(strips), sum(widths), True)
    path, start, _ = model.folder.extent(piece.hf)
    dtype = model.folder.info(piece.hf).dtype
    if dtype not in FLOATS:
        raise ConversionError(f"{piece.hf} is quantised and strided; this is not supported, entry {mapped.entry}")
    width = elements(mapped.shape[1:]) * ITEMSIZE[dtype]
    strip = Strip(0, rows, numbered.number(path), start + index * rows * width, 0, width)
    return Strided((strip,), width, False)


def _is_packed(model: HfModel, name: str) -> bool:
    return isinstance(model.quantised, Mxfp4) and model.folder.has(name + BLOCKS)


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
    if (last.row + last.rows, last.left, last.width) != (strip.row, strip.left, strip.width):
        return False
    same = last.source == strip.source and strip.offset == last.offset + last.rows * last.width
    if last.scales is None or strip.scales is None:
        return same and last.scales is strip.scales
    return same and last.scales._replace(first=strip.scales.first) == strip.scales


def _rows_before(model: HfModel, piece: Piece) -> int:
    """Rows before a piece's leading index, in a tensor that holds all experts."""
    return 0 if piece.index is None else piece.index * model.folder.info(piece.hf).shape[1]


def _scales(model: HfModel, piece: Piece, first: int, numbered: Numbered) -> Scales | None:
    info = model.folder.info(piece.hf)
    if not isinstance(model.quantised, Quantised) or info.dtype in FLOATS:
        return None
    name = model.quantised.scales_of(piece.hf)
    path, offset, _ = model.folder.extent(name)
    dtype, shape = model.folder.info(name)
    if piece.index is not None:
        offset += piece.index * elements(shape[1:]) * ITEMSIZE[dtype]
        first -= _rows_before(model, piece)
    return Scales(numbered.number(path), offset, dtype, shape[-1], first, model.quantised.block)
