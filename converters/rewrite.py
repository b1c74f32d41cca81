"""Plans Hugging Face safetensors → Hugging Face safetensors in another form: experts, dtype, FP8, pickles no more.

The table of a family says twice which rows make up a megatron-core tensor, once for each layout of experts; both have
the same rows in the same order, so that rows go from one to the other without megatron-core's format between; where
one of them is strided (`strided_copy`), by way of megatron-core's order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.merge import Merged, merged_adapters
from megabatch.converters.bijection import invert
from megabatch.converters.engine.plan import Arrangement, Numbered, Plan, Strip, Tensor, uncollected
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.hf_output import HfForm, layout_of, plan_folder
from megabatch.converters.hf_strips import joined, plain_dtype, read_dtype, strided, strip_of
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.mxfp4 import MadePlain
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.strided_copy import StridedCopy
from megabatch.errors import ConversionError

Key = tuple[str, int]
"""Name and leading index (0 where it has none) of a tensor that is written."""


@uncollected()
def plan_rewrite(
    hf_folder: str | os.PathLike[str],
    form: HfForm,
    *,
    adapters: Sequence[str | os.PathLike[str]] = (),
    accept_bin: bool = False,
) -> Plan:
    """Plans the folder; block-scaled FP8 is made plain, and experts are one by one unless the form says fused.

    `adapters` are merged into the weights.
    Raises: ConversionError for whatever does not fit, before anything is written.
    """
    model = open_hf_model(hf_folder, accept_quantised=True, accept_bin=accept_bin)
    try:
        if model.quantised is not None and form.fp8:
            raise ConversionError(f"{hf_folder}: fp8_quantise: its weights are in block-scaled FP8 already")
        numbered = Numbered()
        merged = merged_adapters(adapters, model.family, model.shape, numbered, accept_bin=accept_bin)
        return _planned(model, Path(hf_folder), form, numbered, merged)
    finally:
        model.folder.close()


def _planned(model: HfModel, folder: Path, form: HfForm, numbered: Numbered, merged: Merged | None) -> Plan:
    table = model.family.tensors(model.shape, experts=layout_of(model.family, model.shape, form))
    copies = {name: of for name, of in model.family.copies(model.shape).items() if name in model.ignored}
    return plan_folder(
        "to_hf",
        folder,
        family=model.family,
        shapes=invert(table),
        copies=copies,
        parts=_parts(model, table, numbered, form.dtype),
        numbered=numbered,
        reference=folder,
        form=form,
        merged=merged,
        ignored={name: why for name, why in model.ignored.items() if name not in copies},
    )


def _parts(model: HfModel, table: Sequence[Mapped], numbered: Numbered, dtype: str | None) -> dict[str, list[Tensor]]:
    """Every tensor to write, or its parts by leading index, lying nowhere yet."""
    strips: dict[Key, list[Strip]] = {}
    owners: dict[Key, _Owner] = {}
    for read, written in zip(model.tensors, table, strict=True):
        first = next(read.pieces)
        dtype_read = read_dtype(model, first.hf)
        row_bytes = elements(read.shape[1:]) * ITEMSIZE[dtype_read]
        arrangement: Arrangement | None = None
        if read.strided:
            made = strided(model, read, numbered)
            pairs, row_bytes = [(next(written.pieces), strip) for strip in made.strips], made.row_bytes
            if made.packed:
                arrangement = MadePlain(read, written.strided)
            else:
                arrangement = None if written.strided else StridedCopy(read, False)
        elif written.strided:
            pairs = [
                (target, strip_of(model, source, row, row_bytes, numbered))
                for source, target, row in zip(read.pieces, written.pieces, _positions(read), strict=True)
            ]
            arrangement = StridedCopy(written, True)
        else:
            pairs = [
                (target, strip_of(model, source, target.rows[0], row_bytes, numbered))
                for source, target in zip(read.pieces, written.pieces, strict=True)
            ]
        for target, strip in pairs:
            key = (target.hf, target.index or 0)
            strips.setdefault(key, []).append(strip)
            owners[key] = _Owner(read, dtype_read, arrangement, row_bytes)
    tensors: dict[str, list[Tensor]] = {}
    for key in sorted(strips, key=lambda key: key[1]):
        tensors.setdefault(key[0], []).append(_tensor(key[0], strips[key], owners[key], dtype))
    return tensors


def _positions(mapped: Mapped) -> Iterator[int]:
    """The first row of each piece in megatron-core's tensor."""
    row = 0
    for piece in mapped.pieces:
        yield row
        row += piece.count


class _Owner(NamedTuple):
    """Whose rows a tensor that is written has, and how they are arranged where only one of the layouts is strided."""

    mapped: Mapped
    dtype: str
    arrangement: Arrangement | None
    row_bytes: int
    """Of what is read."""


def _tensor(name: str, strips: Iterable[Strip], owner: _Owner, dtype: str | None) -> Tensor:
    mapped, read = owner.mapped, owner.dtype
    rows = list(joined(sorted(strips, key=lambda strip: strip.row)))
    count, columns = rows[-1].row + rows[-1].rows, elements(mapped.shape[1:])
    written = mapped.dtype or dtype or plain_dtype(read)
    return Tensor(
        name=name,
        file=0,
        offset=0,
        shape=(count, *mapped.shape[1:]),
        dtype=written,
        source_dtype=read,
        rows=count,
        row_bytes=columns * ITEMSIZE[written],
        source_row_bytes=owner.row_bytes,
        strips=tuple(rows),
        arrangement=owner.arrangement,
    )
