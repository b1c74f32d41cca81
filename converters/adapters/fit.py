"""Whether an adapter that was read is one that a run can go on training: its layers, ranks and scale are the run's."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.adapter import Adapter, Block, Tables
from megabatch.converters.adapters.open import open_adapters
from megabatch.converters.adapters.targets import Target
from megabatch.converters.engine.plan import Matrix, Numbered
from megabatch.errors import ConversionError


class Fitting(NamedTuple):
    """An adapter that fits."""

    adapter: Adapter
    matrices: dict[str, Matrix]
    """A and B of every adapted layer, by their names in PEFT's folder; of an embedding A as its transpose."""


def open_fitting(
    folder: Path, tables: Tables, targets: Sequence[Target], *, scale: float, whole: Collection[str] = ()
) -> Fitting:
    """Opens an adapter of either format.

    Args: whole: Hugging Face's names of the tensors that are trained in full besides.
    Raises: ConversionError for an adapter of another model, or naming what else differs from the run's.
    """
    (adapter,) = open_adapters([folder], tables, Numbered())
    return Fitting(adapter, _matrices(adapter, targets, scale, whole))


def _matrices(adapter: Adapter, targets: Sequence[Target], scale: float, whole: Collection[str]) -> dict[str, Matrix]:
    blocks = {block.part: block for found in adapter.blocks.values() for block in found}
    wanted = {(f"{part}.weight", None): (target, part) for target in targets for part in target.parts}
    if extra := sorted(f"{name}" for name, _ in blocks.keys() - wanted.keys()):
        raise _fault(adapter, f"adapts {_some(extra)}, which the run does not; name it in target_modules")
    if missing := sorted(name for name, _ in wanted.keys() - blocks.keys()):
        raise _fault(adapter, f"does not adapt {_some(missing)}, which the run does; leave it out of target_modules")
    if set(adapter.whole) != set(whole):
        other = sorted(set(adapter.whole) ^ set(whole))
        raise _fault(adapter, f"and the run differ in what is trained in full: {_some(other)}; see modules_to_save")
    found: dict[str, Matrix] = {}
    for part, (target, layer) in wanted.items():
        block = blocks[part]
        _check(adapter, layer, block, target, scale)
        a, b = (block.left, block.right) if target.is_embedding else (block.right, block.left)
        found[target.peft_name(layer, "A")] = a
        found[target.peft_name(layer, "B")] = b._replace(transposed=not b.transposed) if target.is_embedding else b
    return found


def _check(adapter: Adapter, layer: str, block: Block, target: Target, scale: float) -> None:
    if block.rank != target.rank:
        rule = f"has rank {block.rank} in {layer}, and lora_rank is {target.rank}; try {block.rank}"
        raise _fault(adapter, rule)
    if not math.isclose(block.scale, scale, rel_tol=1e-9):
        rule = f"is scaled by {block.scale:g} in {layer}, and the run's by {scale:g}; set lora_alpha and use_rslora"
        raise _fault(adapter, rule)


def _fault(adapter: Adapter, what: str) -> ConversionError:
    return ConversionError(f"{adapter.path}: the adapter {what}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
