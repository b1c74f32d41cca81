"""Mapping tables: which rows of which Hugging Face tensors make up each megatron-core tensor.

A family's table is data. Its rows carry `{l}` for the layer, `{e}` for the expert and `{a,b,c}` for the Hugging Face
tensors that are fused; expanded for one `ModelShape` they become `Mapped` tensors made of `Piece`s, and those are
read in both directions: towards megatron-core by `shards.shard_reads`, towards Hugging Face by `shards.hf_writes`.
Nothing here touches a file or a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from megabatch.plan.shape import ModelShape

Split = Literal["column", "row", "replicated", "vocab"]
"""How tensor parallelism cuts a tensor: each section's rows, the columns, not at all, the padded vocabulary's rows."""

ExpertLayout = Literal["per_expert", "fused"]
"""How a Hugging Face folder holds experts: one tensor for each, or one 3-D tensor for all experts of a layer."""

Layers = Literal["all", "dense", "moe"]
"""The layers a row applies to."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one Hugging Face tensor."""

    hf: str
    """Name of the Hugging Face tensor."""
    rows: tuple[int, int]
    """First row and the row after the last, in dimension 0 (behind `index`)."""
    index: int | None = None
    """Leading index of a fused 3-D tensor, or None."""

    @property
    def count(self) -> int:
        return self.rows[1] - self.rows[0]


Section = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Mapped:
    """One unsharded megatron-core tensor and the Hugging Face rows it consists of."""

    name: str
    """Canonical name on disk, Transformer Engine's, with the layer inside; experts share one name for each layer."""
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    """Full shape in megatron-core's layout, before any padding of the vocabulary."""
    split: Split
    """How tensor parallelism cuts it; for experts, expert tensor parallelism."""
    sections: tuple[Section, ...]
    """All pieces of all sections, concatenated along dimension 0, give the tensor. A column split cuts each section
    into equal parts."""
    dtype: str | None = None
    """safetensors' name of the dtype that megatron-core insists on, or None for the model's own."""
    entry: Row | None = field(default=None, compare=False, repr=False)
    """The table's row, for error messages."""

    @property
    def pieces(self) -> Iterator[Piece]:
        return (piece for section in self.sections for piece in section)


Dimensions = Mapping[str, int]


def dimensions(shape: ModelShape) -> Dimensions:
    """The sizes that rows refer to by name."""
    return {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "head": shape.kv_channels,
        "heads": shape.num_attention_heads * shape.kv_channels,
        "groups": shape.num_query_groups * shape.kv_channels,
        "ffn": shape.ffn_hidden_size,
        "experts": shape.num_experts or 0,
        "expert_ffn": shape.moe_ffn_hidden_size or 0,
    }


@dataclass(frozen=True, slots=True)
class Row:
    """A megatron-core tensor and the Hugging Face tensors it consists of; subclasses say how."""

    name: str
    """Canonical name; `{l}` stands for the layer."""
    hf: str
    """Hugging Face name; `{l}` layer, `{e}` expert, `{a,b}` the tensors that are fused, in order."""
    dims: tuple[str, ...]
    """Shape of each Hugging Face tensor, in names of `dimensions`."""
    _: KW_ONLY
    split: Split = "replicated"
    layers: Layers = "all"
    when: str | None = None
    """Attribute of `ModelShape` that must be true for the row to apply."""
    dtype: str | None = None

    def sections(self, names: tuple[str, ...], shape: ModelShape) -> tuple[Section, ...]:
        """The pieces, given the Hugging Face names with layer and expert filled in."""
        raise NotImplementedError

    def expand(self, shape: ModelShape, *, layer: int | None, experts: ExpertLayout) -> Iterator[Mapped]:
        """The tensors of this row in one layer (None for a row outside the layers)."""
        yield self.mapped(self.sections(hf_names(self.hf, layer=layer), shape), shape, layer=layer)

    def mapped(
        self, sections: tuple[Section, ...], shape: ModelShape, *, layer: int | None, expert: int | None = None
    ) -> Mapped:
        sizes = dimensions(shape)
        rows = sum(piece.count for section in sections for piece in section)
        full = (rows, *(sizes[dim] for dim in self.dims[1:]))
        name = self.name.replace("{l}", str(layer))
        return Mapped(name, layer, expert, full, self.split, sections, self.dtype, self)

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.name

    def applies(self, shape: ModelShape) -> bool:
        return self.when is None or bool(getattr(shape, self.when))

    def applies_to(self, shape: ModelShape, *, layer: int) -> bool:
        return self.layers == "all" or (self.layers == "moe") == shape.is_moe_layer(layer)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name} <- {self.hf})"


@dataclass(frozen=True, slots=True)
class Rename(Row):
    """The same tensor under another name."""

    def sections(self, names: tuple[str, ...], shape: ModelShape) -> tuple[Section, ...]:
        return ((Piece(names[0], (0, dimensions(shape)[self.dims[0]])),),)


@dataclass(frozen=True, slots=True)
class Qkv(Row):
    """Query, key and value rows, interleaved by query group: r query heads, the key head, the value head, and so on.

    `dims` is the query tensor's shape. One section: a tensor-parallel rank holds consecutive groups.
    """

    def sections(self, names: tuple[str, ...], shape: ModelShape) -> tuple[Section, ...]:
        query, key, value = names
        head = shape.kv_channels
        wide = shape.num_attention_heads // shape.num_query_groups * head
        groups = range(shape.num_query_groups)
        return (
            tuple(
                Piece(name, (group * rows, (group + 1) * rows))
                for group in groups
                for name, rows in ((query, wide), (key, head), (value, head))
            ),
        )


@dataclass(frozen=True, slots=True)
class GateUp(Row):
    """The gate's rows and then the up projection's: two sections, so that a rank holds a part of both."""

    def sections(self, names: tuple[str, ...], shape: ModelShape) -> tuple[Section, ...]:
        rows = dimensions(shape)[self.dims[0]]
        return tuple((Piece(name, (0, rows)),) for name in names)


@dataclass(frozen=True, slots=True)
class Experts:
    """A row for each expert of each mixture-of-experts layer; `row.hf` has `{e}`."""

    row: Row
    _: KW_ONLY
    fused: str
    """Name of the 3-D Hugging Face tensor whose leading index is the expert and whose rows are `row`'s, in order."""

    def expand(self, shape: ModelShape, *, layer: int | None, experts: ExpertLayout) -> Iterator[Mapped]:
        for expert in range(shape.num_experts or 0):
            sections = self.row.sections(hf_names(self.row.hf, layer=layer, expert=expert), shape)
            if experts == "fused":
                sections = _stacked(sections, self.fused.replace("{l}", str(layer)), index=expert)
            yield self.row.mapped(sections, shape, layer=layer, expert=expert)

    @property
    def per_layer(self) -> bool:
        return self.row.per_layer

    def applies(self, shape: ModelShape) -> bool:
        return bool(shape.num_experts) and self.row.applies(shape)

    def applies_to(self, shape: ModelShape, *, layer: int) -> bool:
        return shape.is_moe_layer(layer)


def _stacked(sections: tuple[Section, ...], hf: str, *, index: int) -> tuple[Section, ...]:
    """The same rows, taken from one fused tensor that holds all the pieces one below the other."""
    placed: list[Section] = []
    position = 0
    for section in sections:
        pieces = []
        for piece in section:
            pieces.append(Piece(hf, (position, position + piece.count), index))
            position += piece.count
        placed.append(tuple(pieces))
    return tuple(placed)


_CHOICE = re.compile(r"\{(\w+(?:,\w+)+)\}")


def hf_names(template: str, *, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
    """Fills in layer and expert and expands `{a,b}`: one name for each alternative, in order."""
    filled = template.replace("{l}", str(layer)).replace("{e}", str(expert))
    choice = _CHOICE.search(filled)
    if choice is None:
        return (filled,)
    return tuple(filled[: choice.start()] + word + filled[choice.end() :] for word in choice[1].split(","))


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor."""
    return math.prod(shape)
