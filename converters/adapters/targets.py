"""Which layers of a model get adapters, by the names that people give, and the adapters' tensors as a table.

A layer of megatron-core that is several of Hugging Face's (query, key and value; gate and up) has one pair of matrices
for each of those that are adapted, so that PEFT's folder has them one to one. In megatron-core's tensors A of all of
them lie one below the other, and B has the rows of the layer's weight that are adapted, in the weight's own order and
cut as the weight is: the rows of one part are multiplied with that part's A alone. In the fused form all parts share
one A, of which PEFT's folder has a copy for each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from megabatch.converters.adapters.mcore_folder import EMBEDDING, low_rank_names, suffixes
from megabatch.converters.adapters.names import low_rank_name
from megabatch.converters.mapping import Mapped, Piece, Split
from megabatch.converters.safe_regex import matches
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

ALL_LINEAR, ALL_ROUTER, ALL_EMBEDDING = "all-linear", "all-router", "all-embedding"
_NOT_LINEAR = ("word_embeddings", "output_layer", "router", "gate", "conv1d", "eh_proj")
"""Matrices that `all-linear` excludes, by the last part of their layer's name."""


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter."""

    weight: Mapped
    parts: tuple[str, ...]
    """The adapted Hugging Face layers in it, ordered by their first rows."""
    rank: int
    fused: bool = False
    """Whether the parts share one A."""

    @property
    def is_embedding(self) -> bool:
        return suffixes(self.weight) == EMBEDDING

    def peft_name(self, part: str, side: str) -> str:
        """The name of a part's matrix in adapter_model.safetensors."""
        return low_rank_name(part, "A" if side == "A" else "B", embedding=self.is_embedding)

    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each matrix by its name in adapter_model.safetensors; of an embedding that of its transpose."""
        shapes: dict[str, tuple[int, ...]] = {}
        for mapped in (self.a, self.b):
            for piece in mapped.pieces:
                rows = max(piece.rows[1], *shapes.get(piece.hf, (0,))[:1])
                shapes |= dict.fromkeys((piece.hf, *mapped.copies), (rows, mapped.shape[1]))
        return shapes

    @cached_property
    def a(self) -> Mapped:
        """A as a row of a table: [rank of all parts, or of the fused form, columns]; of an embedding its transpose,
        [vocabulary, rank]."""
        if self.is_embedding:
            return self._of_embedding("A", self.weight.shape[0], "vocab")
        names = [self.peft_name(part, "A") for part in self.parts]
        names, copies = (names[:1], tuple(names[1:])) if self.fused else (names, ())
        pieces = tuple(Piece(name, (0, self.rank)) for name in names)
        shape = (self.rank * len(names), self.weight.shape[1])
        split: Split = "row" if self.weight.split == "row" else "replicated"
        name = low_rank_names(self.weight)[0]
        a = replace(self.weight, name=name, shape=shape, split=split, sections=(pieces,), entry=None)
        return replace(a, copies=copies)

    @cached_property
    def b(self) -> Mapped:
        """B as a row of a table: [rows that are adapted, rank]."""
        if self.is_embedding:
            return self._of_embedding("B", self.weight.shape[1], "replicated")
        sections = tuple(section for section in map(self._adapted, self.weight.sections) if section)
        rows = sum(piece.count for section in sections for piece in section)
        split: Split = "replicated" if self.weight.split == "row" else self.weight.split
        name = low_rank_names(self.weight)[1]
        return replace(self.weight, name=name, shape=(rows, self.rank), split=split, sections=sections, entry=None)

    def _adapted(self, section: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple(
            replace(piece, hf=self.peft_name(layer_of(piece), "B"))
            for piece in section
            if layer_of(piece) in self.parts
        )

    def _of_embedding(self, side: str, rows: int, split: Split) -> Mapped:
        name = low_rank_names(self.weight)[0 if side == "A" else 1]
        piece = Piece(self.peft_name(self.parts[0], side), (0, rows))
        return replace(self.weight, name=name, shape=(rows, self.rank), split=split, sections=((piece,),), entry=None)


def layer_of(piece: Piece) -> str:
    """Hugging Face's name of the layer that a piece belongs to."""
    return piece.hf.removesuffix(".weight")


def table_of(targets: Sequence[Target]) -> list[Mapped]:
    """The adapters' tensors, in the order of the layers."""
    return [mapped for target in targets for mapped in (target.a, target.b)]


def find_targets(
    table: Sequence[Mapped], names: Sequence[str], *, regex: str | None = None, rank: int, fused: bool = False
) -> list[Target]:
    """The layers that names or a pattern select, in the table's order.

    A name is the end of a layer's name, megatron-core's (`linear_qkv`) or Hugging Face's (`q_proj`, which adapts these
    rows of `linear_qkv` alone), or one of `all-linear`, `all-router`, `all-embedding`. `regex`, in place of names,
    must match the whole of either name of a layer. `fused`: the parts of a layer share one A.
    Raises: ConversionError for a name that no layer has, with the nearest.
    """
    layers = [mapped for mapped in table if _is_layer(mapped)]
    if regex is not None:
        found = [Target(layer, parts, rank, fused) for layer in layers if (parts := _matching(layer, regex))]
        if not found:
            raise ConversionError(f"{regex!r} matches no layer; layers are called {_examples(layers)}")
        return _alike(found, layers)
    for name in names:
        if not any(_parts(layer, name) for layer in layers):
            raise ConversionError(_unknown(name, layers))
    chosen = ((layer, {part for name in names for part in _parts(layer, name)}) for layer in layers)
    return _alike(
        [
            Target(layer, tuple(p for p in _layers(layer) if p in parts), rank, fused)
            for layer, parts in chosen
            if parts
        ],
        layers,
    )


def _is_in(mapped: Mapped, module: str) -> bool:
    """Whether a tensor belongs to a module, named by the end of either name of it."""
    names = (mapped.name, *(piece.hf for piece in mapped.pieces))
    return any(_ends(name.rpartition(".")[0], module) for name in names)


def _alike(targets: list[Target], layers: Sequence[Mapped]) -> list[Target]:
    """Proves that the experts of a layer are adapted in the same parts, all of them: one tensor holds their adapters,
    and peft joins gate and up of all experts. Raises: ConversionError."""
    experts = [layer for layer in layers if layer.expert is not None]
    adapted = {(target.weight.name, target.weight.expert): target for target in targets}
    touched = {target.weight.name for target in targets if target.weight.expert is not None}
    for layer in experts:
        target = adapted.get((layer.name, layer.expert))
        if layer.name in touched and (target is None or target.parts != _layers(layer)):
            left = next(part for part in _layers(layer) if target is None or part not in target.parts)
            raise ConversionError(f"{left}: of a layer's experts all parts get an adapter or none; name this one too")
    return targets


def find_whole(table: Sequence[Mapped], modules: Sequence[str], *, biases: bool) -> frozenset[str]:
    """Canonical names of the tensors that are trained in full beside adapters: of modules, all biases, a score head.

    PEFT trains a score head without being asked, since a new one begins with random numbers.
    Raises: ConversionError for a name of no module.
    """
    found = {mapped.name for mapped in table if (biases and mapped.name.endswith("bias")) or _is_score_head(mapped)}
    for module in modules:
        named = {mapped.name for mapped in table if _is_in(mapped, module)}
        if not named:
            raise ConversionError(_unknown(module, [mapped for mapped in table if _is_layer(mapped)]))
        found |= named
    return frozenset(found)


def _is_score_head(mapped: Mapped) -> bool:
    return mapped.name.startswith("output_layer.") and mapped.split == "replicated"


MERGES_ONE_OF_TWO = (
    "would merge the embedding's adapter into the output layer too, which is the same tensor and has no adapter; save "
    "the adapter alone, and merge it afterwards with megabatch-convert --merge_lora, which unties the two"
)


def changes_one_of_two(shape: ModelShape, targets: Sequence[Target]) -> bool:
    """Whether the embedding has an adapter and is the output layer too, which stays as it is, as in PEFT."""
    return shape.ties_output_layer and any(target.is_embedding for target in targets)


def hf_names(table: Sequence[Mapped], names: Collection[str]) -> frozenset[str]:
    """Hugging Face's tensors in those of these canonical names."""
    return frozenset(piece.hf for mapped in table if mapped.name in names for piece in mapped.pieces)


def _is_layer(mapped: Mapped) -> bool:
    return len(mapped.shape) == 2 and mapped.name.endswith("weight") and "layer_norm" not in mapped.name


def _layers(mapped: Mapped) -> tuple[str, ...]:
    """Hugging Face's layers in one of megatron-core's."""
    return tuple(dict.fromkeys(map(layer_of, mapped.pieces)))


def _parts(mapped: Mapped, name: str) -> tuple[str, ...]:
    """The parts of a layer that a name selects."""
    module, leaf = module_of(mapped), module_of(mapped).rpartition(".")[2]
    if name == ALL_LINEAR:
        means_all = leaf not in _NOT_LINEAR
    elif name == ALL_ROUTER:
        means_all = leaf == "router"
    elif name == ALL_EMBEDDING:
        means_all = leaf == "word_embeddings"
    else:
        means_all = _ends(module, name)
    return tuple(part for part in _layers(mapped) if means_all or _ends(part, name))


def _matching(mapped: Mapped, regex: str) -> tuple[str, ...]:
    whole = matches(regex, module_of(mapped), whole=True)
    return tuple(part for part in _layers(mapped) if whole or matches(regex, part, whole=True))


def module_of(mapped: Mapped) -> str:
    """`gate_weight` is a parameter without a module of its own, the layer `gate`."""
    return mapped.name.removesuffix("weight").rstrip("._")


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _leaves(layers: Sequence[Mapped]) -> list[str]:
    """What layers are called, without the number of layer and expert, megatron-core's names first."""
    mcore = (module_of(layer).rpartition(".")[2] for layer in layers)
    theirs = (part.rpartition(".")[2] for layer in layers for part in _layers(layer))
    return list(dict.fromkeys([*mcore, *theirs]))


def _unknown(name: str, layers: Sequence[Mapped]) -> str:
    known = [ALL_LINEAR, ALL_ROUTER, ALL_EMBEDDING, *_leaves(layers)]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known)}"
    return f"{name!r} is the end of no layer's name; {hint}"


def _examples(layers: Sequence[Mapped]) -> str:
    first = layers[len(layers) // 2]
    return f"{module_of(first)} or {_layers(first)[0]}"
