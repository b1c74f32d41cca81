"""Checks adapters for infinities and NaN: an infinity or NaN would spread over the whole model that it is merged
into."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.converters.adapters.adapter import Adapter
from megabatch.converters.engine.compute import Computer
from megabatch.converters.engine.gather import chunks
from megabatch.converters.engine.plan import Strip
from megabatch.converters.engine.sources import Sources
from megabatch.errors import ConversionError


def check_finite(adapter: Adapter) -> None:
    """Reads a whole adapter. Raises: ConversionError naming its first tensor with a number that is not finite."""
    computer = Computer()
    checked: set[Strip] = set()
    with Sources(adapter.sources) as sources:
        for name, dtype, strips in _tensors(adapter):
            new = [strip for strip in strips if strip not in checked]
            checked.update(new)
            if not all(computer.is_finite(memoryview(part), dtype) for part in chunks(sources, new)):
                beyond = ", or numbers beyond float32's" if dtype == "F64" else ""
                raise ConversionError(
                    f"{adapter.path}: {name}: has infinities or NaN{beyond}; megabatch does not merge it"
                )


def _tensors(adapter: Adapter) -> Iterator[tuple[str, str, tuple[Strip, ...]]]:
    """Names, dtypes and places of all tensors; some more than once."""
    for blocks in adapter.blocks.values():
        for block in blocks:
            for matrix in (block.left, block.right):
                yield matrix.name, matrix.dtype, matrix.strips
    for name, whole in adapter.whole.items():
        yield name, whole.dtype, whole.strips
