"""An adapter that was read, in a run's terms: one to go on training has the run's layers, ranks and scale; a frozen
one beside it has its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.adapter import Adapter, Block, Part, Tables
from megabatch.converters.adapters.open import open_adapters, require_one
from megabatch.converters.adapters.peft_folder import is_peft
from megabatch.converters.adapters.targets import Target, layer_of
from megabatch.converters.engine.gather import matrix_bytes
from megabatch.converters.engine.plan import Matrix, Numbered, Strip
from megabatch.converters.engine.source_digests import check_strips
from megabatch.converters.engine.sources import Sources
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConversionError
from megabatch.saved.find import find_checkpoint

_WORKERS = 2


class Fitting(NamedTuple):
    """An adapter that fits."""

    adapter: Adapter
    matrices: dict[str, Matrix]
    """A and B of every adapted layer, by their names in PEFT's folder; of an embedding A as its transpose."""


def check_digests(fitting: Fitting) -> None:
    """Checks the numbers of an adapter and its config against the digests of the checkpoint that it lies in, if that
    has some.

    Raises: ConversionError naming the damaged parts.
    """
    adapter = fitting.adapter
    strips = [strip for matrix in fitting.matrices.values() for strip in matrix.strips]
    strips += [strip for whole in adapter.whole.values() for strip in whole.strips]
    check_strips([source.path for source in adapter.sources], strips, workers=_WORKERS)
    all_of_it = Strip(row=0, rows=1, source=0, offset=0, left=0, width=adapter.config.path.stat().st_size)
    check_strips([adapter.config.path], [all_of_it], workers=1)


class Opened(NamedTuple):
    """An adapter with layers, ranks and scales of its own."""

    fitting: Fitting
    targets: tuple[Target, ...]
    scales: tuple[float, ...]
    """What B A is multiplied by, for each target."""


def open_fitting(
    folder: Path, tables: Tables, targets: Sequence[Target], *, scale: float, whole: Collection[str] = ()
) -> Fitting:
    """Opens an adapter of either format.

    Args: whole: Hugging Face's names of the tensors that are trained in full besides.
    Raises: ConversionError for an adapter of another model, or naming what else differs from the run's.
    """
    (adapter,) = open_adapters([folder], tables, Numbered())
    return Fitting(adapter, _matrices(adapter, targets, scale, whole))


def open_own(folder: Path, tables: Tables, table: Sequence[Mapped]) -> Opened:
    """Opens an adapter of either format, whichever layers of a model with this table it adapts.

    Args: folder: of PEFT's or in megatron-core's format, or a run or checkpoint of ours.
    Raises: ConversionError for an adapter of another model, one that also replaces tensors of the model, or one whose
    ranks or scales differ inside a layer of megatron-core's; CheckpointError.
    """
    require_one(folder)
    saved = None if is_peft(folder) else find_checkpoint(folder)
    (adapter,) = open_adapters([folder if saved is None or not saved.of_a_run else saved.weights], tables, Numbered())
    if adapter.whole:
        rule = f"replaces {_some(sorted(adapter.whole))} of the model, which another adapter cannot share; merge it"
        raise _fault(adapter, rule)
    rows = {(mapped.name, mapped.expert): mapped for mapped in table}
    found = [_own(adapter, key, blocks, rows.get(key)) for key, blocks in adapter.blocks.items()]
    targets, scales = tuple(target for target, _ in found), tuple(scale for _, scale in found)
    return Opened(Fitting(adapter, _named(adapter, targets)), targets, scales)


def _own(
    adapter: Adapter, key: tuple[str, int | None], blocks: Sequence[Block], weight: Mapped | None
) -> tuple[Target, float]:
    """A layer's target and scale, as the adapter has them."""
    names = {layer_of(piece) for piece in weight.pieces} if weight is not None else set()
    parts = tuple(name.removesuffix(".weight") for (name, index) in (block.part for block in blocks) if index is None)
    if weight is None or len(parts) < len(blocks) or not names.issuperset(parts):
        raise _fault(adapter, f"adapts {key[0]}, which the model that is trained has not as a layer of its own")
    if len({(block.rank, block.scale) for block in blocks}) > 1:
        described = ", ".join(f"{block.part[0]}: rank {block.rank}, scale {block.scale:g}" for block in blocks)
        raise _fault(adapter, f"differs inside one layer of megatron-core's ({described}); merge it into a model")
    return Target(weight, parts, blocks[0].rank), blocks[0].scale


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
    for part, (target, layer) in wanted.items():
        _check(adapter, layer, blocks[part], target, scale)
    _check_shared(adapter, [target for target in targets if target.fused and len(target.parts) > 1], blocks)
    return _named(adapter, targets)


def _named(adapter: Adapter, targets: Sequence[Target]) -> dict[str, Matrix]:
    """A and B of every layer of these targets, by their names in PEFT's folder."""
    blocks = {block.part: block for found in adapter.blocks.values() for block in found}
    found: dict[str, Matrix] = {}
    for target, layer in ((one, part) for one in targets for part in one.parts):
        block = blocks[f"{layer}.weight", None]
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


def _check_shared(adapter: Adapter, targets: Sequence[Target], blocks: Mapping[Part, Block]) -> None:
    """Raises: ConversionError for parts of a layer whose A are different, where the run has one for all."""
    with Sources(adapter.sources) as sources:
        for target in targets:
            first, *others = (blocks[f"{part}.weight", None].right for part in target.parts)
            for part, other in zip(target.parts[1:], others, strict=True):
                if other != first and matrix_bytes(sources, other) != matrix_bytes(sources, first):
                    rule = f"has an A of its own in {part}, not the one of {target.parts[0]}; set lora_fused=False"
                    raise _fault(adapter, rule)


def _fault(adapter: Adapter, what: str) -> ConversionError:
    return ConversionError(f"{adapter.path}: the adapter {what}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
