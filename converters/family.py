"""A model family: its table, how its config.json is read and written, and the proof that the table fits a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from itertools import groupby
from typing import Any

from megabatch.converters.bijection import TensorInfo, compare, invert
from megabatch.converters.mapping import Block, ExpertLayout, Experts, Mapped, Row
from megabatch.converters.sizes import sizes_of
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Ignorable:
    """Tensors of a Hugging Face folder that no megatron-core tensor needs."""

    pattern: str
    """Regular expression for the whole name."""
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A table that was checked against a Hugging Face folder, and the tensors that it skips."""

    tensors: list[Mapped]
    ignored: dict[str, str]
    """Tensors in the folder that we do not read, each with the reason."""
    duplicates: dict[str, str]
    """Tensors in the folder that must repeat another one (tied embeddings, embeddings that layers of multi-token
    prediction bring along), with that one's name. The shapes were compared; `safetensors_io.HfFolder.same` compares
    the bytes."""
    carried: list[str]
    """Tensors of another part of the model (a vision tower) that goes along unchanged: no megatron-core tensor has
    them, and a Hugging Face folder is not complete without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Architectures that share a table."""

    name: str
    """Hugging Face's model type."""
    architectures: tuple[str, ...]
    rows: tuple[Row | Experts, ...]
    shape: Callable[[Mapping[str, Any]], ModelShape]
    """Reads a config.json, old and new spellings; ConversionError names what it cannot read."""
    hf_config: Callable[..., dict[str, Any]]
    """`hf_config(shape, *, dtype, **token_ids)`: a config.json for a new model."""
    tied: Mapping[str, str]
    """Tensors left out of the file when embeddings are tied, with the tensor they repeat."""
    ignorable: tuple[Ignorable, ...] = ()
    mtp_copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that each layer of multi-token prediction brings along in a folder, with the tensor they repeat; `{l}`
    is its layer."""
    carried: str | None = None
    """Regular expression for tensors of another part of the model that goes along unchanged."""

    def tensors(self, shape: ModelShape, *, experts: ExpertLayout = "per_expert") -> list[Mapped]:
        """Every megatron-core tensor of the model, in layer order, over the folder's layout of experts."""
        return list(self._expanded(shape, experts))

    def _expanded(self, shape: ModelShape, experts: ExpertLayout) -> Iterator[Mapped]:
        _check_size(shape)
        sizes = sizes_of(shape)
        rows = [row for row in self.rows if row.applies(shape)]
        for block, run in groupby(rows, key=lambda row: row.block):
            in_block = list(run)
            for layer, mtp in _layers(shape, block):
                # a layer of multi-token prediction is of the decoder's last kind
                kind = min(layer or 0, shape.num_layers - 1)
                for row in in_block:
                    if layer is None or row.applies_to(shape, layer=kind):
                        yield from row.expand(sizes, layer=layer, mtp=mtp, experts=experts)

    def hf_tensors(self, shape: ModelShape, *, experts: ExpertLayout = "per_expert") -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, in layer order."""
        return invert(self.tensors(shape, experts=experts))

    def expert_layout(self, found: Mapping[str, TensorInfo], shape: ModelShape) -> ExpertLayout:
        """Which layout of experts a folder uses, by names, or by shapes where both have the same."""
        experts = [row for row in self.rows if isinstance(row, Experts) and row.fused]
        layers = [layer for layer in range(shape.num_layers) if shape.is_moe_layer(layer)]
        names = {str(row.fused).replace("{l}", str(layer)) for row in experts for layer in layers} & found.keys()
        if any(row.one_by_one for row in experts) or not names:
            return "fused" if names else "per_expert"
        expected = self.hf_tensors(shape, experts="fused")
        return "fused" if all(found[name].shape == expected[name] for name in names) else "per_expert"

    def copies(self, shape: ModelShape) -> dict[str, str]:
        """Tensors that a whole folder holds although they repeat another one, with that one's name."""
        layers = range(shape.num_layers, shape.num_layers + (shape.mtp_num_layers or 0))
        # without weights of its own the output layer is the embedding
        own = {of: of if shape.has_output_layer else self.tied.get(of, of) for of in self.mtp_copies.values()}
        return {name.replace("{l}", str(layer)): own[of] for layer in layers for name, of in self.mtp_copies.items()}

    def present(self, shape: ModelShape, names: Iterable[str], *, mtp: str | None = None) -> ModelShape:
        """The shape without layers of multi-token prediction when no tensor of theirs is among the names.

        transformers leaves these layers out of a folder and their number in config.json. A folder that has some of
        their tensors keeps them in its shape, and `check` names those that are missing.
        Args: mtp: what the names of their tensors start with; by default Hugging Face's.
        """
        if not shape.mtp_num_layers:
            return shape
        own = invert(mapped for mapped in self.tensors(shape) if mapped.name.startswith("mtp."))
        found = any(name.startswith(mtp) if mtp else name in own for name in names)
        return shape if found else replace(shape, mtp_num_layers=None)

    def check(self, shape: ModelShape, found: Mapping[str, TensorInfo]) -> Checked:
        """Checks that the table is a bijection between its tensors and those in a Hugging Face folder.

        Raises: ConversionError naming missing, left-over, mis-shaped and mis-typed tensors with their table entries.
        """
        tensors = self.tensors(shape, experts=self.expert_layout(found, shape))
        expected = invert(tensors)
        rest = [name for name in found if name not in expected]
        duplicates = {name: of for name, of in self._repeated(shape, found) if name in rest}
        carried = [name for name in rest if self.carried and re.fullmatch(self.carried, name)]
        ignored = {
            name: known.reason for name in rest for known in self.ignorable if re.fullmatch(known.pattern, name)
        }
        aside = {*ignored, *duplicates, *carried}
        left = {name: info for name, info in found.items() if name not in aside}
        compare(tensors, expected, left, family=self.name)
        ignored |= {name: f"it repeats {of}" for name, of in duplicates.items()}
        return Checked(tensors, ignored, duplicates, carried)

    def _repeated(self, shape: ModelShape, found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
        """Tensors that repeat another one: because embeddings are tied, or in MTP layers."""
        tied = {} if shape.untie_embeddings_and_output_weights else self.tied
        for name, of in (*tied.items(), *self.copies(shape).items()):
            if name in found and found[name] == found.get(of):
                yield name, of


_MOST_PARTS = 4_000_000
"""Most rows of a table; the largest models have some hundred thousand."""


def _check_size(shape: ModelShape) -> None:
    """Raises: ConversionError for a model whose table would fill the memory."""
    experts = (shape.num_experts or 0) * sum(shape.moe_layers)
    groups = max(shape.num_attention_heads, shape.linear_num_value_heads or 0)
    layers = shape.num_layers + (shape.mtp_num_layers or 0)
    if 3 * experts + 4 * groups * layers > _MOST_PARTS:
        raise ConversionError(
            f"config.json: {layers} layers, {shape.num_attention_heads} attention heads and "
            f"{shape.num_experts or 0} experts exceed any real model"
        )


def _layers(shape: ModelShape, block: Block) -> Iterator[tuple[int | None, int | None]]:
    """Hugging Face's layer, and the layer of multi-token prediction, of each place in a block."""
    if block == "model":
        yield None, None
    elif block == "layers":
        yield from ((layer, None) for layer in range(shape.num_layers))
    else:
        yield from ((shape.num_layers + mtp, mtp) for mtp in range(shape.mtp_num_layers or 0))
