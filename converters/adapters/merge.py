"""Adapters merged into weights: what a planner's tensors become."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from megabatch.converters.adapters.adapter import Adapter, Block, Part, Span, Tables, Whole, spans_by_part
from megabatch.converters.adapters.finite import check_finite
from megabatch.converters.adapters.open import open_adapters
from megabatch.converters.engine.gather import chunks, sliced
from megabatch.converters.engine.plan import LowRank, Numbered, SourceFile, Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.family import Family
from megabatch.converters.mapping import Mapped, Piece, elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

UNTIED = {"tie_word_embeddings": False}
"""The config.json change for a model whose embeddings are no longer tied."""


def merged_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    family: Family,
    shape: ModelShape,
    numbered: Numbered,
    *,
    accept_bin: bool = False,
) -> Merged | None:
    """Opens adapters of either format for merging; None if there are none.

    Raises: ConversionError for adapters that do not fit the model.
    """
    if not adapters:
        return None
    tables = Tables(family, shape)
    opened = open_adapters(adapters, tables, numbered, accept_bin=accept_bin)
    for adapter in opened:
        check_finite(adapter)
    return Merged(opened, tables, numbered.files)


class Merged:
    """Adapters of one base model, summed in their order.

    If embeddings are tied and an adapter changes only one of the two, the result unties them: `untied`.
    Raises: ConversionError for adapters that exclude each other.
    """

    def __init__(self, adapters: Sequence[Adapter], tables: Tables, sources: list[SourceFile]) -> None:
        self._adapters, self._tables = adapters, tables
        self._whole: dict[str, Whole] = {}
        biased = [adapter.path for adapter in adapters if adapter.config.bias != "none"]
        if len(biased) > 1:
            raise ConversionError(f"{biased[0]} and {biased[1]}: both change biases, but a model can have only one")
        for adapter in adapters:
            for name, whole in adapter.whole.items():
                if name in self._whole and not _equal(whole, self._whole[name], sources):
                    raise ConversionError(f"{adapter.path}: {name} is already replaced by an earlier adapter")
                self._whole[name] = whole
        self._tied: dict[str, str] = {}
        if tables.shape.has_output_layer and not tables.tied_shape.has_output_layer:
            self._tied = self._untie(sources)

    def _untie(self, sources: list[SourceFile]) -> dict[str, str]:
        """The output layer and its embedding, if the merge makes them two tensors."""
        touched = {name for adapter in self._adapters for name in adapter.touches}
        blocks = {block.part[0] for adapter in self._adapters for found in adapter.blocks.values() for block in found}
        for output, embedding in self._tables.family.tied.items():
            if not touched & {output, embedding}:
                continue
            if embedding in blocks and embedding in self._whole:
                self._whole.setdefault(output, self._whole[embedding])  # the base model's own, saved by PEFT
            if not blocks & {output, embedding} and self._same(output, embedding, sources):
                del self._whole[output]
                continue
            return {output: embedding}
        return {}

    def _same(self, one: str, other: str, sources: list[SourceFile]) -> bool:
        """Whether an adapter brings two equal tensors."""
        first, second = self._whole.get(one), self._whole.get(other)
        return first is not None and second is not None and _equal(first, second, sources)

    @property
    def aside(self) -> dict[str, str]:
        """Adapter tensors that we do not read, each with the reason."""
        return {name: why for adapter in self._adapters for name, why in adapter.aside.items()}

    @property
    def untied(self) -> bool:
        return bool(self._tied)

    def extra_mapped(self) -> list[tuple[Mapped, Mapped]]:
        """The same as megatron-core tensors, each with what is to be read for it."""
        return [
            (mapped, replace(mapped, sections=((Piece(self._tied[part[0]], (0, mapped.shape[0])),),)))
            for mapped in self._tables.tables["per_expert"]
            for part in spans_by_part(mapped)
            if part[0] in self._tied
        ]

    def copies(self, copies: Mapping[str, str]) -> Mapping[str, str]:
        """Tensors that repeat another one, with its name; an output layer that was untied is one of these."""
        own = self._tables.family.copies(self._tables.shape) if self._tied else {}
        return {name: own.get(name, of) for name, of in copies.items()}

    def folder(
        self, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Sequence[Tensor]], *, fp8: bool
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, Sequence[Tensor]]]:
        """All tensors of a Hugging Face folder, each by leading index, with what the adapters change.

        Raises: ConversionError for `fp8`: the sums would have to be rounded twice.
        """
        if fp8:
            raise ConversionError("fp8_quantise: merge the adapters first, then quantise the result")
        dims = {**shapes, **{name: shapes[of] for name, of in self._tied.items()}}
        merged: dict[str, Sequence[Tensor]] = {}
        for name in dims:
            own = parts[self._tied.get(name, name)]
            stacked = name in self._tables.stacks
            merged[name] = [self.hf(one, (name, index if stacked else None)) for index, one in enumerate(own)]
        return dims, merged

    def mcore(self, tensor: Tensor, mapped: Mapped) -> Tensor:
        """A megatron-core tensor with what the adapters change."""
        tensor = self._replaced(tensor, mapped)
        layer, top = self._tables.place(mapped)
        own = [Span(top, mapped.shape[0], 0, 1)]
        blocks = self._blocks(layer, mapped.expert)
        terms = [term for block in blocks for term in _between(block, own)]
        return tensor._replace(low_rank=tuple(terms)) if terms else tensor

    def hf(self, tensor: Tensor, part: Part) -> Tensor:
        """A Hugging Face tensor (of one that holds all experts, one expert) with what the adapters change.

        Raises: ConversionError for tensors whose rows are not megatron-core's.
        """
        if (whole := self._whole.get(part[0])) is not None:
            tensor = _with_whole(tensor, whole, part)
        terms: list[LowRank] = []
        for mapped in self._tables.users(part):
            blocks = self._blocks(mapped.name, mapped.expert)
            if blocks and mapped.strided:
                raise ConversionError(
                    f"{part[0]}: its rows are not in megatron-core's order; merge its adapter with --to_mcore, then "
                    "convert the result with --to_hf"
                )
            own = spans_by_part(mapped).get(part, []) if blocks else []
            terms += (term for block in blocks for term in _between(block, own))
        return tensor._replace(low_rank=tuple(_joined(terms))) if terms else tensor

    def _blocks(self, layer: str, expert: int | None) -> list[Block]:
        return [block for adapter in self._adapters for block in adapter.blocks.get((layer, expert), [])]

    def _replaced(self, tensor: Tensor, mapped: Mapped) -> Tensor:
        """The tensor with those of its pieces that an adapter brings."""
        found = [self._whole.get(piece.hf) for piece in mapped.pieces]
        if not any(found):
            return tensor
        dtypes = {tensor.source_dtype if whole is None else whole.dtype for whole in found}
        if mapped.strided or len(dtypes) > 1:
            raise ConversionError(
                f"{mapped.name} {list(mapped.shape)}: an adapter replaces parts of it, in "
                f"{' and '.join(sorted(dtypes))}: not supported"
            )
        strips: list[Strip] = []
        position = 0
        for piece, whole in zip(mapped.pieces, found, strict=True):
            first = piece.rows[0] + (piece.index or 0) * (self._tables.shapes[piece.hf][1] if piece.index else 0)
            given = (tensor.strips, position) if whole is None else (whole.strips, first)
            strips += sliced(*given, piece.count, row=position)
            position += piece.count
        (dtype,) = dtypes
        size = elements(mapped.shape[1:]) * ITEMSIZE[dtype]
        return tensor._replace(strips=tuple(strips), source_dtype=dtype, source_row_bytes=size)


def _with_whole(tensor: Tensor, whole: Whole, part: Part) -> Tensor:
    rows = whole.shape[0] if part[1] is None else whole.shape[1]
    size = elements(whole.shape[1:] if part[1] is None else whole.shape[2:]) * ITEMSIZE[whole.dtype]
    if tensor.rows != rows:  # a planner's rows of another length; the bytes are the same
        tensor = tensor._replace(rows=rows, row_bytes=tensor.data_bytes // rows)
    strips = sliced(whole.strips, (part[1] or 0) * rows, rows, row=0)
    return tensor._replace(
        strips=tuple(strips),
        source_dtype=whole.dtype,
        source_row_bytes=size,
        add=0.0,
        arrangement=None,
    )


def _between(block: Block, own: Iterable[Span]) -> Iterable[LowRank]:
    """What a block adds to a Hugging Face tensor whose rows in megatron-core's are `own`."""
    for place in own:
        for span in block.spans:
            start, stop = max(place.row, span.row), min(place.row + place.rows, span.row + span.rows)
            if start < stop:
                yield _term(place.first + start - place.row, span, start - span.row, stop - start, block)


def _term(row: int, span: Span, skip: int, count: int, block: Block) -> LowRank:
    first = span.first + skip * span.every
    return LowRank(row, count, block.left, first, span.every, block.right, block.scale)


def _joined(terms: Iterable[LowRank]) -> list[LowRank]:
    """Neighbours of one block as one."""
    joined: list[LowRank] = []
    for term in terms:
        last = joined[-1] if joined else None
        if last is not None and (last.left, last.right, last.scale) == (term.left, term.right, term.scale):
            after = (last.row + last.rows, last.first + last.rows)
            if last.every == term.every == 1 and after == (term.row, term.first):
                joined[-1] = last._replace(rows=last.rows + term.rows)
                continue
        joined.append(term)
    return joined


def _equal(one: Whole, other: Whole, sources: list[SourceFile]) -> bool:
    """Whether two tensors have the same bytes, cut in the same way."""
    cuts = [[strip[:2] + strip[4:6] for strip in whole.strips] for whole in (one, other)]
    if one.dtype != other.dtype or cuts[0] != cuts[1]:
        return False
    with Sources(sources) as opened:
        return all(a == b for a, b in zip(chunks(opened, one.strips), chunks(opened, other.strips), strict=True))
