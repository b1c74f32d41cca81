"""An adapter in terms of megatron-core's tensors, whatever format it was read from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.config import AdapterConfig
from megabatch.converters.bijection import invert
from megabatch.converters.engine.plan import Matrix, SourceFile, Strip
from megabatch.converters.family import Family
from megabatch.converters.mapping import ExpertLayout, Experts, Mapped
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

Target = tuple[str, int | None]
"""The weight of a layer of megatron-core: its canonical name, and the expert."""
Part = tuple[str, int | None]
"""A Hugging Face tensor, or one leading index of it."""


class Span(NamedTuple):
    """Consecutive rows of a megatron-core tensor that come from one Hugging Face tensor."""

    row: int
    rows: int
    first: int
    """Their first row there."""
    every: int
    """1, or 2 where every second row there is one of them."""


def spans_by_part(mapped: Mapped) -> dict[Part, list[Span]]:
    """The rows of a megatron-core tensor by the Hugging Face tensor that they come from."""
    found: dict[Part, list[Span]] = {}
    position = 0
    for piece in mapped.pieces:
        spans = found.setdefault((piece.hf, piece.index), [])
        span = Span(position, piece.count, piece.rows[0], piece.step)
        position += piece.count
        if spans and _follows(spans[-1], span):
            spans[-1] = spans[-1]._replace(rows=spans[-1].rows + span.rows)
        else:
            spans.append(span)
    return found


def _follows(last: Span, span: Span) -> bool:
    return last.every == span.every == 1 and (last.row + last.rows, last.first + last.rows) == span[:1] + span[2:3]


@dataclass(frozen=True, slots=True)
class Block:
    """`scale * left @ right` for the rows of one Hugging Face tensor inside a megatron-core tensor."""

    part: Part
    spans: tuple[Span, ...]
    left: Matrix
    """[rows of the Hugging Face tensor, rank]: PEFT's B, or the transpose of an embedding's A."""
    right: Matrix
    """[rank, columns]: PEFT's A, or the transpose of an embedding's B."""
    scale: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]


class Whole(NamedTuple):
    """A tensor of the base model that the adapter replaces (`modules_to_save`, biases)."""

    shape: tuple[int, ...]
    dtype: str
    strips: tuple[Strip, ...]


@dataclass(slots=True)
class Adapter:
    """An adapter that was read and checked against the base model."""

    path: Path
    config: AdapterConfig
    tables: Tables
    sources: list[SourceFile]
    """The files that the strips refer to by number."""
    blocks: dict[Target, list[Block]] = field(default_factory=dict)
    """The blocks of each tensor, ordered by their first rows."""
    whole: dict[str, Whole] = field(default_factory=dict)
    """By Hugging Face name; rows of all experts one below the other."""
    aside: dict[str, str] = field(default_factory=dict)
    """Redundant tensors in its files, each with the reason."""

    @property
    def touches(self) -> set[str]:
        """The Hugging Face tensors that it changes."""
        return {*self.whole, *(block.part[0] for blocks in self.blocks.values() for block in blocks)}


class Place(NamedTuple):
    """Where a tensor lies in the weight of its layer."""

    layer: str
    """The weight's name; the tensor's own, unless the checkpoint has the layer's parts as tensors of their own."""
    row: int


class Tables:
    """A family's table over both layouts of experts, for a model whose embeddings are not tied.

    An adapter may change the embedding but not the output layer, so we treat the two separately. A layer whose parts
    are separate tensors (linear attention's `in_proj.weight.query`, …) is one weight here, as it is one layer in
    megatron-core.
    Raises: ConversionError for families whose two layouts have the same names.
    """

    def __init__(self, family: Family, shape: ModelShape) -> None:
        if any(row.fused and not row.one_by_one for row in family.rows if isinstance(row, Experts)):
            raise ConversionError(
                f"adapters of {shape.architecture} are not supported: its experts have two layouts under one name"
            )
        self.family, self.tied_shape = family, shape
        self.shape = replace(shape, untie_embeddings_and_output_weights=True)
        layouts: tuple[ExpertLayout, ...] = ("per_expert", "fused")
        self.tables = {layout: list(_whole_layers(family.tensors(self.shape, experts=layout))) for layout in layouts}
        self.shapes = {name: dims for layout in layouts for name, dims in invert(self.tables[layout]).items()}
        """Shape of every Hugging Face tensor that a table knows."""
        self.by_target = {
            layout: {(mapped.name, mapped.expert): mapped for mapped in table} for layout, table in self.tables.items()
        }
        self._parts: dict[Part, dict[Target, Mapped]] = {}
        for mapped in (mapped for layout in layouts for mapped in self.tables[layout]):
            for piece in mapped.pieces:
                self._parts.setdefault((piece.hf, piece.index), {})[mapped.name, mapped.expert] = mapped
        self.places: dict[str, Place] = {}
        self.parts: dict[str, list[Mapped]] = {}
        """The tensors of a layer that a checkpoint has in parts, by the weight's name."""
        for mapped in family.tensors(self.shape):
            if (layer := _layer_of(mapped)) is not None:
                own = self.parts.setdefault(layer, [])
                self.places[mapped.name] = Place(layer, sum(other.shape[0] for other in own))
                own.append(mapped)
        self.stacks = {name: dims[0] for name, dims in self.shapes.items() if (name, None) not in self._parts}
        """Tensors that hold all experts, with their number."""

    def place(self, mapped: Mapped) -> Place:
        return self.places.get(mapped.name) or Place(mapped.name, 0)

    def tensors_of(self, layer: Mapped) -> list[Mapped]:
        """The tensors that a checkpoint has of a layer's weight."""
        return self.parts.get(layer.name) or [layer]

    def users(self, part: Part) -> Iterable[Mapped]:
        """The megatron-core tensors with rows of a Hugging Face tensor."""
        return self._parts.get(part, {}).values()

    def block(self, part: Part, left: Matrix, right: Matrix, scale: float) -> Iterator[tuple[Target, Block]]:
        """An adapter of a Hugging Face tensor as blocks of the megatron-core tensors that it is part of."""
        for mapped in self.users(part):
            spans = tuple(spans_by_part(mapped)[part])
            yield (mapped.name, mapped.expert), Block(part, spans, left, right, scale)


_PART = re.compile(r"(.*\.weight)\.\w+")


def _layer_of(mapped: Mapped) -> str | None:
    """The weight that a tensor is a part of, where it is not all of it."""
    part = _PART.fullmatch(mapped.name)
    return part[1] if part is not None and len(mapped.shape) == 2 else None


def _whole_layers(tensors: Iterable[Mapped]) -> Iterator[Mapped]:
    """The tensors with those of one layer joined, one below the other."""
    for layer, run in groupby(tensors, key=_layer_of):
        parts = list(run)
        if layer is None:
            yield from parts
            continue
        rows = sum(part.shape[0] for part in parts)
        sections = tuple(section for part in parts for section in part.sections)
        yield replace(parts[0], name=layer, shape=(rows, *parts[0].shape[1:]), sections=sections)
