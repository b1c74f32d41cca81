"""Mapping tables: which rows of which Hugging Face tensors make up each megatron-core tensor.

A family's table is data. Its rows carry `{l}` for the layer, `{m}` for a layer of multi-token prediction, `{e}` for
the expert and `{a,b,c}` for the Hugging Face tensors that are fused; expanded for one `ModelShape` they become
`Mapped` tensors made of `Piece`s, and those are read in both directions: towards megatron-core by
`shards.shard_reads`, towards Hugging Face by `shards.hf_writes`.
Nothing here touches a file or a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, field, replace
from typing import Literal

from megabatch.converters.sizes import Sizes
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

Split = Literal["column", "row", "replicated", "vocab"]
"""How tensor parallelism cuts a tensor: each section's rows, the columns, not at all, the padded vocabulary's rows."""

ExpertLayout = Literal["per_expert", "fused"]
"""How a Hugging Face folder holds experts: one tensor per expert, or one 3-D tensor for all experts of a layer."""

Layers = Literal["all", "dense", "moe", "attention", "linear_attention"]
"""The layers a row applies to, by the kind of their MLP or of their attention."""

Block = Literal["model", "layers", "mtp"]
"""Where a row applies: once, in each decoder layer, or in each MTP layer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one Hugging Face tensor, one after the other unless it is `strided`."""

    hf: str
    """Name of the Hugging Face tensor."""
    rows: tuple[int, int]
    """First row and a row after the last, in dimension 0 (behind `index`)."""
    index: int | None = None
    """Leading index of a fused 3-D tensor, or None."""
    step: int = 1
    """Every `step`th row, from the first on."""
    transposed: bool = False
    """The file holds the tensor's transpose: `rows` are the columns there."""

    @property
    def count(self) -> int:
        return -((self.rows[0] - self.rows[1]) // self.step)

    @property
    def strided(self) -> bool:
        """Whether its rows are not contiguous bytes in the file."""
        return self.step != 1 or self.transposed


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
    """safetensors' name of the dtype that megatron-core requires, or None for the model's own."""
    entry: Row | None = field(default=None, compare=False, repr=False)
    """The table's row, for error messages."""
    offset: float = 0.0
    """Added to Hugging Face's values to give megatron-core's (a norm that megatron-core centres on zero)."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face tensors that are equal to the one of its pieces: written, and not read."""

    @property
    def strided(self) -> bool:
        """Whether its bytes are not contiguous in the Hugging Face file. All its pieces then come from one tensor, or
        one leading index of it, and cover it fully: `strided_copy` moves it whole."""
        return any(piece.strided for piece in self.pieces)

    @property
    def pieces(self) -> Iterator[Piece]:
        return (piece for section in self.sections for piece in section)


@dataclass(frozen=True, slots=True)
class Row:
    """A megatron-core tensor and the Hugging Face tensors it consists of; subclasses say how."""

    name: str
    """Canonical name; `{l}` stands for the layer, `{m}` for the layer of multi-token prediction."""
    hf: str
    """Hugging Face name; `{l}` layer, counted on behind the decoder's for multi-token prediction, `{m}` layer of
    multi-token prediction, `{e}` expert, `{a,b}` the tensors that are fused, in order."""
    dims: tuple[str, ...]
    """Shape of each Hugging Face tensor, in names of `sizes_of`."""
    _: KW_ONLY
    split: Split = "replicated"
    layers: Layers = "all"
    when: str | None = None
    """Attribute of `ModelShape` that must be true for the row to apply, or false where it starts with `!`."""
    dtype: str | None = None
    hf_fused: str | None = None
    """Hugging Face name in a folder with fused experts, where it is another one."""
    offset: float = 0.0

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        """The pieces, given the Hugging Face names with layer and expert filled in."""
        raise NotImplementedError

    def expand(
        self, sizes: Sizes, *, layer: int | None, mtp: int | None = None, experts: ExpertLayout
    ) -> Iterator[Mapped]:
        """The tensors of this row in one layer (None for a row outside the layers).

        Args: layer: Hugging Face's; mtp: the layer of multi-token prediction, for rows of that block.
        """
        template = self.hf_fused if self.hf_fused and experts == "fused" else self.hf
        yield self.mapped(self.sections(hf_names(template, layer=layer, mtp=mtp), sizes), sizes, layer=layer, mtp=mtp)

    def mapped(
        self,
        sections: tuple[Section, ...],
        sizes: Sizes,
        *,
        layer: int | None,
        mtp: int | None = None,
        expert: int | None = None,
    ) -> Mapped:
        rows = sum(piece.count for section in sections for piece in section)
        full = (rows, *(sizes[dim] for dim in self.dims[1:]))
        name = self.name.replace("{l}", str(layer)).replace("{m}", str(mtp))
        decoder_layer = layer if mtp is None else None
        return Mapped(name, decoder_layer, expert, full, self.split, sections, self.dtype, self, self.offset)

    @property
    def block(self) -> Block:
        return "layers" if "{l}" in self.name else "mtp" if "{m}" in self.name else "model"

    def applies(self, shape: ModelShape) -> bool:
        if self.when is None:
            return True
        return bool(getattr(shape, self.when.removeprefix("!"))) != self.when.startswith("!")

    def applies_to(self, shape: ModelShape, *, layer: int) -> bool:
        if self.layers == "all":
            return True
        if self.layers in ("dense", "moe"):
            return (self.layers == "moe") == shape.is_moe_layer(layer)
        return (self.layers == "linear_attention") == shape.is_linear_attention_layer(layer)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name} <- {self.hf})"


@dataclass(frozen=True, slots=True)
class Rename(Row):
    """The same tensor under another name."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        return ((Piece(names[0], (0, sizes[self.dims[0]])),),)


@dataclass(frozen=True, slots=True)
class Transposed(Row):
    """The same tensor with rows and columns exchanged; `dims` is megatron-core's shape."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        return ((Piece(names[0], (0, sizes[self.dims[0]]), transposed=True),),)


@dataclass(frozen=True, slots=True)
class Qkv(Row):
    """Query, key and value rows, interleaved by query group: r query heads, the key head, the value head, and so on.

    `dims` is the query tensor's shape. One section: a tensor-parallel rank holds consecutive groups.
    """

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        query, key, value = names
        head = sizes["head"]
        wide = sizes["num_heads"] // sizes["num_groups"] * head
        return (
            tuple(
                Piece(name, (group * rows, (group + 1) * rows))
                for group in range(sizes["num_groups"])
                for name, rows in ((query, wide), (key, head), (value, head))
            ),
        )


@dataclass(frozen=True, slots=True)
class GatedQkv(Row):
    """As `Qkv`, with an output gate: Hugging Face's query tensor has a head's query rows and then its gate's, for each
    head; megatron-core has all query heads of a group, their gates, the key head, the value head."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        query, key, value = names
        head, ratio = sizes["head"], sizes["num_heads"] // sizes["num_groups"]
        pieces: list[Piece] = []
        for group in range(sizes["num_groups"]):
            heads = range(2 * group * ratio, 2 * (group + 1) * ratio, 2)
            for part in (0, 1):
                pieces += (Piece(query, ((i + part) * head, (i + part + 1) * head)) for i in heads)
            pieces += (Piece(name, (group * head, (group + 1) * head)) for name in (key, value))
        return (tuple(pieces),)


@dataclass(frozen=True, slots=True)
class GateUp(Row):
    """The gate's rows and then the up projection's: two sections, so that a rank holds a part of both."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        rows = sizes[self.dims[0]]
        return tuple((Piece(name, (0, rows)),) for name in names)


@dataclass(frozen=True, slots=True)
class TransposedGateUp(Row):
    """One Hugging Face tensor whose columns are the gate's rows and then the up projection's; `dims` is the shape of
    either in megatron-core."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        rows = sizes[self.dims[0]]
        return tuple((Piece(names[0], (first, first + rows), transposed=True),) for first in (0, rows))


@dataclass(frozen=True, slots=True)
class WovenGateUp(Row):
    """One Hugging Face tensor whose even rows are the gate's and whose odd rows are the up projection's.

    `dims` is the shape of either in megatron-core.
    """

    transposed: bool = False

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        rows = 2 * sizes[self.dims[0]]
        return tuple((Piece(names[0], (first, rows), step=2, transposed=self.transposed),) for first in (0, 1))


@dataclass(frozen=True, slots=True)
class PartOfGroups(Row):
    """A part of one Hugging Face tensor that is laid out group by group, each group with the same parts one below the
    other; megatron-core has a tensor for each part. `dims` is the part's shape, without groups."""

    groups: str
    """Size that counts the groups."""
    parts: tuple[str, ...]
    """Sizes of the parts of all groups together."""
    part: int
    """Which one."""

    def sections(self, names: tuple[str, ...], sizes: Sizes) -> tuple[Section, ...]:
        groups = sizes[self.groups]
        widths = [sizes[part] // groups for part in self.parts]
        start, width, whole = sum(widths[: self.part]), widths[self.part], sum(widths)
        firsts = range(start, groups * whole, whole)
        return (tuple(Piece(names[0], (first, first + width)) for first in firsts),)


@dataclass(frozen=True, slots=True)
class Experts:
    """A row for each expert of each mixture-of-experts layer; `row.hf` has `{e}`, or names a 3-D tensor whose leading
    index is the expert."""

    row: Row
    _: KW_ONLY
    fused: str | None = None
    """Name of the 3-D Hugging Face tensor whose leading index is the expert and whose rows are `row`'s, in order; it
    may be `row.hf`, laid out in another way. None: there is no other layout than `row.hf`."""

    def expand(
        self, sizes: Sizes, *, layer: int | None, mtp: int | None = None, experts: ExpertLayout
    ) -> Iterator[Mapped]:
        fused = None if self.fused is None else hf_names(self.fused, layer=layer, mtp=mtp)[0]
        for expert in range(sizes["experts"]):
            sections = self.row.sections(hf_names(self.row.hf, layer=layer, mtp=mtp, expert=expert), sizes)
            if fused is not None and experts == "fused":
                sections = _stacked(sections, fused, index=expert)
            elif not self.one_by_one:
                sections = tuple(tuple(replace(piece, index=expert) for piece in section) for section in sections)
            yield self.row.mapped(sections, sizes, layer=layer, mtp=mtp, expert=expert)

    @property
    def one_by_one(self) -> bool:
        """Whether a folder can have a tensor for each expert."""
        return "{e}" in self.row.hf

    @property
    def block(self) -> Block:
        return self.row.block

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


def hf_names(
    template: str, *, layer: int | None = None, mtp: int | None = None, expert: int | None = None
) -> tuple[str, ...]:
    """Fills in layer and expert and expands `{a,b}`: one name for each alternative, in order."""
    filled = template.replace("{l}", str(layer)).replace("{m}", str(mtp)).replace("{e}", str(expert))
    choice = _CHOICE.search(filled)
    if choice is None:
        return (filled,)
    return tuple(filled[: choice.start()] + word + filled[choice.end() :] for word in choice[1].split(","))


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor."""
    return math.prod(shape)
