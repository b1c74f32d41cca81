"""Plans megatron-core torch_dist, in any sharding → Hugging Face safetensors: rows gathered into their place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megabatch.converters.adapters.merge import merged_adapters
from megabatch.converters.bijection import invert
from megabatch.converters.engine.manifest import read_manifest
from megabatch.converters.engine.plan import Numbered, Plan, Strip, Tensor, uncollected
from megabatch.converters.engine.run import run
from megabatch.converters.families import family_of
from megabatch.converters.family import Family
from megabatch.converters.hf_model import read_config
from megabatch.converters.hf_output import HfForm, layout_of, plan_folder
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io import HfFolder
from megabatch.converters.safetensors_io.folder import has_safetensors
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.strided_copy import StridedCopy
from megabatch.converters.torch_dist.aliases import is_optimizer, respelled, unwrapped
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.converters.torch_dist.folder import Block, TorchDistFolder
from megabatch.converters.torch_dist.keys import Cell, cell
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

_SHOWN = 8

Placed = tuple[Mapped, Cell]


def to_hf(
    mcore: str | os.PathLike[str],
    hf_reference: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_shard_size: str | int | None = None,
    workers: int = 2,
) -> None:
    """Converts a checkpoint; the output must not exist or be empty.

    Raises: ConversionError.
    """
    run(plan_to_hf(mcore, hf_reference, HfForm(max_shard_size=max_shard_size)), output, workers=workers)


@uncollected()
def plan_to_hf(
    mcore: str | os.PathLike[str],
    hf_reference: str | os.PathLike[str] | None,
    form: HfForm,
    *,
    adapters: Sequence[str | os.PathLike[str]] = (),
    accept_bin: bool = False,
) -> Plan:
    """Plans a Hugging Face folder from a checkpoint; skips optimizer state in it.

    `mcore`: any path that `saved.find` accepts. `hf_reference`: the folder that config, tokenizer and the like
    come from, whose weights are not read; None looks for a config.json beside the checkpoint.
    `form`: its dtype is that of every weight but those whose dtype megatron-core prescribes, and those that become
    block-scaled FP8, of the numbers that the checkpoint has. `adapters` are merged into the weights; `accept_bin` is
    about theirs.
    Raises: ConversionError for anything that does not fit, before anything is written.
    """
    folder = find_torch_dist(mcore)
    reference = Path(hf_reference) if hf_reference is not None else find_reference(Path(mcore), folder)
    source = TorchDistFolder(folder)
    try:
        return _planned(source, reference, form, adapters, accept_bin=accept_bin)
    finally:
        source.close()


def find_reference(given: Path, checkpoint: Path) -> Path:
    """The folder with config.json that belongs to a checkpoint. Raises: ConversionError when there is none."""
    step = checkpoint.parent
    places = [given, given / "hf", checkpoint, step, step / "hf", *(parent / "model" for parent in step.parents[1:2])]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ConversionError(
        f"{given}: there is no config.json beside this checkpoint; name the Hugging Face folder of the model that it "
        "was trained from as --model"
    )


def _planned(
    source: TorchDistFolder,
    reference: Path,
    form: HfForm,
    adapters: Sequence[str | os.PathLike[str]],
    *,
    accept_bin: bool,
) -> Plan:
    config = read_config(reference)
    config.pop("quantization_config", None)
    family = family_of(config)
    source.rename(unwrapped([key for key in source.entries if not is_optimizer(key)]))
    shape = family.present(family.shape(config), source.entries, mtp="mtp.")
    table, numbered = family.tensors(shape, experts=layout_of(family, shape, form)), Numbered()
    parts = _gathered(source, locate(source, table, shape), numbered, form.dtype)
    merged = merged_adapters(adapters, family, shape, numbered, accept_bin=accept_bin)
    return plan_folder(
        "to_hf",
        source.path,
        family=family,
        shapes=invert(table),
        copies=_copies(family, shape, reference),
        parts=parts,
        numbered=numbered,
        reference=reference,
        form=form,
        merged=merged,
        ignored={
            key: "optimizer, generators and frozen models are not converted"
            for key in source.entries
            if is_optimizer(key)
        },
    )


def _copies(family: Family, shape: ModelShape, reference: Path) -> dict[str, str]:
    """Tensors that the folder repeats, with the name of what they repeat: all that published folders do, but for those
    that the folder which the checkpoint was made from, or the reference, leaves out."""
    copies = family.copies(shape)
    if not copies:
        return copies
    if has_safetensors(reference):
        with HfFolder(reference) as folder:
            names = set(folder.names)
        has_layers = family.present(shape, names).mtp_num_layers
        return {name: of for name, of in copies.items() if name in names or not has_layers}
    lacks = (read_manifest(reference) or {}).get("lacks", ())
    return {name: of for name, of in copies.items() if name not in lacks}


Key = tuple[str, int]
"""Name and leading index (0 where it has none) of a Hugging Face tensor."""


@dataclass(slots=True)
class _Part:
    """What is gathered for a Hugging Face tensor, or for one leading index of it."""

    mapped: Mapped
    dtype: str
    strips: list[Strip] = field(default_factory=list)


def _gathered(
    source: TorchDistFolder, placed: Sequence[Placed], numbered: Numbered, dtype: str | None
) -> dict[str, list[Tensor]]:
    """Every Hugging Face tensor as its parts by leading index, lying nowhere yet."""
    parts: dict[Key, _Part] = {}
    for mapped, place in placed:
        blocks, read, position = source.blocks(place.key, place.lead), source.dtype(place.key), 0
        unit = elements(mapped.shape[2:]) * ITEMSIZE[read]
        for piece in mapped.pieces:
            part = parts.setdefault((piece.hf, piece.index or 0), _Part(mapped, read))
            if (part.dtype, part.mapped.offset) != (read, mapped.offset):
                raise ConversionError(
                    f"{source.path}: {piece.hf} is made of {part.mapped.name} {part.dtype} and {mapped.name} {read}, "
                    f"which differ in dtype or in what is added to them, entry {mapped.entry}"
                )
            first = position if mapped.strided else piece.rows[0]
            part.strips += _strips(first, piece.count, position, blocks, unit, numbered)
            position += piece.count
    tensors: dict[str, list[Tensor]] = {}
    for (name, _), part in sorted(parts.items(), key=lambda item: item[0][1]):
        tensors.setdefault(name, []).append(_tensor(name, part, dtype))
    return tensors


def _tensor(name: str, part: _Part, dtype: str | None) -> Tensor:
    mapped = part.mapped
    written = part.dtype if mapped.dtype is not None or dtype is None else dtype
    columns = elements(mapped.shape[1:])
    strips = sorted(part.strips, key=lambda strip: strip.row)
    rows = max(strip.row + strip.rows for strip in strips)
    return Tensor(
        name=name,
        file=0,
        offset=0,
        shape=(rows, *mapped.shape[1:]),
        dtype=written,
        source_dtype=part.dtype,
        rows=rows,
        row_bytes=columns * ITEMSIZE[written],
        source_row_bytes=columns * ITEMSIZE[part.dtype],
        strips=tuple(strips),
        add=-mapped.offset,
        arrangement=StridedCopy(mapped, True) if mapped.strided else None,
    )


def _strips(
    row: int, count: int, position: int, blocks: Sequence[Block], unit: int, numbered: Numbered
) -> Iterator[Strip]:
    """What the blocks of a megatron-core tensor have of its rows from `position` on, as rows from `row` on."""
    for block in blocks:
        first, last = max(position, block.rows[0]), min(position + count, block.rows[1])
        if first < last:
            width = (block.cols[1] - block.cols[0]) * unit
            offset = block.offset + (first - block.rows[0]) * width
            left = block.cols[0] * unit
            yield Strip(row + first - position, last - first, numbered.number(block.path), offset, left, width)


def locate(source: TorchDistFolder, tensors: Sequence[Mapped], shape: ModelShape) -> list[Placed]:
    """Each canonical tensor's cell, after proving that the checkpoint has exactly these, in whatever spelling.

    Raises: ConversionError naming missing, left-over and mis-shaped tensors.
    """
    stacked = not any(key.startswith("decoder.layers.0.") for key in source.entries)
    placed = [(mapped, cell(mapped, shape, stacked=stacked)) for mapped in tensors]
    expected = {place.key: (*place.axes, *mapped.shape) for mapped, place in placed}
    padded = {place.key for mapped, place in placed if mapped.split == "vocab"}
    source.rename(respelled(expected, source.entries))
    faults = [
        *_shape_faults(source, expected, padded),
        *(
            f"{key} {list(entry.size)} is left over: no entry of the table makes it"
            for key, entry in source.entries.items()
            if key not in expected and not is_optimizer(key)
        ),
    ]
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConversionError(f"{source.path}: does not fit config.json\n  " + "\n  ".join(faults[:_SHOWN]) + more)
    return placed


def _shape_faults(source: TorchDistFolder, expected: Mapping[str, tuple[int, ...]], padded: set[str]) -> Iterator[str]:
    for key, size in expected.items():
        entry = source.entries.get(key)
        if entry is None:
            yield f"{key} {list(size)} is missing"
        elif entry.size != size and not (
            key in padded and len(entry.size) == len(size) and entry.size[1:] == size[1:] and entry.size[0] >= size[0]
        ):
            yield f"{key} has shape {list(entry.size)}, config.json gives {list(size)}"
