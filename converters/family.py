"""A model family: its table, how its config.json is read and written, and the proof that the table fits a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megabatch.converters.bijection import TensorInfo, compare, invert
from megabatch.converters.mapping import ExpertLayout, Experts, Mapped, Row
from megabatch.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Ignorable:
    """Tensors of a Hugging Face folder that no megatron-core tensor needs."""

    pattern: str
    """Regular expression for the whole name."""
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A table that was proven to fit a Hugging Face folder, and the tensors it leaves aside."""

    tensors: list[Mapped]
    ignored: dict[str, str]
    """Tensors in the folder that are not read, each with the reason."""
    duplicates: dict[str, str]
    """Tensors in the folder that must repeat another one (tied embeddings), with that one's name. The shapes were
    compared; `safetensors_io.HfFolder.same` compares the bytes."""


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
    """`hf_config(shape, *, dtype, **token_ids)`: a config.json for a model built on the spot."""
    tied: Mapping[str, str]
    """Tensors left out of the file when embeddings are tied, with the tensor they repeat."""
    ignorable: tuple[Ignorable, ...] = ()

    def tensors(self, shape: ModelShape, *, experts: ExpertLayout = "per_expert") -> list[Mapped]:
        """Every megatron-core tensor of the model, in layer order, over the folder's layout of experts."""
        return list(self._expanded(shape, experts))

    def _expanded(self, shape: ModelShape, experts: ExpertLayout) -> Iterator[Mapped]:
        rows = [row for row in self.rows if row.applies(shape)]
        for per_layer, run in groupby(rows, key=lambda row: row.per_layer):
            block = list(run)
            if not per_layer:
                for row in block:
                    yield from row.expand(shape, layer=None, experts=experts)
                continue
            for layer in range(shape.num_layers):
                for row in block:
                    if row.applies_to(shape, layer=layer):
                        yield from row.expand(shape, layer=layer, experts=experts)

    def hf_tensors(self, shape: ModelShape, *, experts: ExpertLayout = "per_expert") -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, in layer order."""
        return invert(self.tensors(shape, experts=experts))

    def expert_layout(self, names: Mapping[str, Any], shape: ModelShape) -> ExpertLayout:
        """Which layout of experts a folder with these tensor names uses."""
        fused = [row.fused for row in self.rows if isinstance(row, Experts)]
        layers = [layer for layer in range(shape.num_layers) if shape.is_moe_layer(layer)]
        found = any(name.replace("{l}", str(layer)) in names for name in fused for layer in layers)
        return "fused" if found else "per_expert"

    def check(self, shape: ModelShape, found: Mapping[str, TensorInfo]) -> Checked:
        """Proves that the table is a bijection between its tensors and those found in a Hugging Face folder.

        Raises: ConversionError naming missing, left-over, mis-shaped and mis-typed tensors with their table entries.
        """
        tensors = self.tensors(shape, experts=self.expert_layout(found, shape))
        expected = invert(tensors)
        rest = [name for name in found if name not in expected]
        duplicates = {name: of for name, of in self._repeated(shape, found) if name in rest}
        ignored = {
            name: known.reason for name in rest for known in self.ignorable if re.fullmatch(known.pattern, name)
        }
        left = {name: info for name, info in found.items() if name not in ignored and name not in duplicates}
        compare(tensors, expected, left, family=self.name)
        ignored |= {name: f"embeddings are tied: it repeats {of}" for name, of in duplicates.items()}
        return Checked(tensors, ignored, duplicates)

    def _repeated(self, shape: ModelShape, found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
        """Tensors that repeat another one because embeddings are tied."""
        if not shape.untie_embeddings_and_output_weights:
            for name, of in self.tied.items():
                if name in found and found[name] == found.get(of):
                    yield name, of
