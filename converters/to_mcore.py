"""Plans Hugging Face safetensors → megatron-core torch_dist: byte extents and the places they go to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megabatch.converters.adapters.merge import UNTIED, Merged, merged_adapters
from megabatch.converters.auxiliary_files import replaced_config
from megabatch.converters.dtypes import read_dtype as dtype_named
from megabatch.converters.engine.plan import (
    Arrangement,
    AuxiliaryFiles,
    Numbered,
    Plan,
    SmallFile,
    Strip,
    Tensor,
    uncollected,
)
from megabatch.converters.engine.run import run
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.hf_strips import joined, plain_dtype, read_dtype, strided, strip_of
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.mxfp4 import MadePlain
from megabatch.converters.quantised import PLAIN
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.strided_copy import StridedCopy
from megabatch.converters.torch_dist.archive import archive_of
from megabatch.converters.torch_dist.keys import Cell, LayerKeys, cell, extra_states, stacks_layers
from megabatch.converters.torch_dist.layout import Item, lay_out
from megabatch.saved.find import RELEASE, TRACKER


def to_mcore(
    hf_folder: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int = 2, files: int | None = None
) -> Plan:
    """Converts a folder to a bare checkpoint; the output must not exist or be empty. Returns the executed plan.

    Raises: ConversionError.
    """
    plan = plan_to_mcore(hf_folder, files=files, bare=True)
    run(plan, output, workers=workers)
    return plan


@uncollected()
def plan_to_mcore(
    hf_folder: str | os.PathLike[str],
    *,
    torch_dtype: str | None = None,
    files: int | None = None,
    bare: bool = False,
    adapters: Sequence[str | os.PathLike[str]] = (),
    accept_bin: bool = False,
    layer_keys: LayerKeys | None = None,
) -> Plan:
    """Plans a folder that Megatron-LM loads: `release/` with the checkpoint, its tracker file and auxiliary files.

    `torch_dtype` casts every weight but those whose dtype megatron-core prescribes. `files` is the number of files of
    tensors, else one for each 8 GiB and at least two. `bare`: the checkpoint alone, not in a folder of its own.
    `accept_bin`: weights of `pytorch_model.bin` are read too, as data.
    `adapters` are merged into the weights. `layer_keys`: one key for all layers, or one for each; by default as
    megatron-core has them unless `moe_layer_freq` is a list.
    Raises: ConversionError for anything that does not fit, before anything is written.
    """
    model = open_hf_model(hf_folder, accept_quantised=True, accept_bin=accept_bin)
    try:
        numbered = Numbered()
        merged = merged_adapters(adapters, model.family, model.shape, numbered, accept_bin=accept_bin)
        stacked = stacks_layers(model.shape, layer_keys)
        dtype = dtype_named(torch_dtype)
        return _planned(model, Path(hf_folder), dtype, numbered, merged, stacked=stacked, files=files, bare=bare)
    finally:
        model.folder.close()


def _planned(
    model: HfModel,
    source: Path,
    dtype: str | None,
    numbered: Numbered,
    merged: Merged | None,
    *,
    stacked: bool,
    files: int | None,
    bare: bool,
) -> Plan:
    prefix = "" if bare else f"{RELEASE}/"
    items = []
    for mapped, read in _reads(model, merged):
        place = cell(mapped, model.shape, stacked=stacked)
        tensor = _tensor(model, read, place, numbered, dtype=dtype)
        tensor = tensor if merged is None else merged.mcore(tensor, mapped)
        items.append(Item(place, mapped.shape, tensor, f"entry {mapped.entry}"))
    checkpoint = lay_out(
        items,
        prefix=prefix,
        files=files,
        states=lambda: extra_states(model.tensors, model.shape, stacked=stacked),
    )
    untied = merged is not None and merged.untied
    return Plan(
        direction="to_mcore",
        source=source,
        sources=numbered.files,
        files=checkpoint.files,
        tensors=checkpoint.tensors,
        small=[*([] if bare else [SmallFile(TRACKER, RELEASE.encode)]), *checkpoint.small],
        auxiliary=None if bare else AuxiliaryFiles(source, _config(model, source, dtype, untied=untied)),
        ignored=model.ignored
        | (merged.aside if merged is not None else {})
        | dict.fromkeys(
            model.carried, "megatron-core has no such part; it is copied back when converting to Hugging Face"
        ),
        lacks=[name for name in model.family.copies(model.shape) if name not in model.ignored],
    )


def _reads(model: HfModel, merged: Merged | None) -> Iterator[tuple[Mapped, Mapped]]:
    """Every tensor of the checkpoint, and what is read for it: an output layer that is tied no longer begins as the
    embedding."""
    yield from ((mapped, mapped) for mapped in model.tensors)
    if merged is not None:
        yield from merged.extra_mapped()


def _config(model: HfModel, source: Path, dtype: str | None, *, untied: bool) -> dict[str, bytes]:
    """config.json for the weights as they will be, where the source's own would be wrong."""
    changes = UNTIED if untied else {}
    if model.quantised is None:
        return replaced_config(source, dtype=dtype, changes=changes)
    return replaced_config(source, dtype=dtype or PLAIN, changes={"quantization_config": None, **changes})


def _dtypes(model: HfModel, mapped: Mapped, dtype: str | None) -> tuple[str, str]:
    """What is read and what is written."""
    read = read_dtype(model, next(mapped.pieces).hf)
    return read, mapped.dtype or dtype or plain_dtype(read)


def _tensor(model: HfModel, mapped: Mapped, place: Cell, numbered: Numbered, *, dtype: str | None) -> Tensor:
    """A tensor without a place in a file yet."""
    read, written = _dtypes(model, mapped, dtype)
    columns = elements(mapped.shape[1:])
    shape = (1,) * len(place.lead) + mapped.shape
    strips, row_bytes, arrangement = _strips(model, mapped, columns * ITEMSIZE[read], numbered)
    return Tensor(
        name=mapped.name if mapped.expert is None else f"{mapped.name}[{mapped.expert}]",
        file=0,
        offset=0,
        shape=shape,
        dtype=written,
        source_dtype=read,
        rows=mapped.shape[0],
        row_bytes=columns * ITEMSIZE[written],
        source_row_bytes=row_bytes,
        strips=strips,
        add=mapped.offset,
        arrangement=arrangement,
        frame=archive_of(written, shape),
    )


def _strips(
    model: HfModel, mapped: Mapped, row_bytes: int, numbered: Numbered
) -> tuple[tuple[Strip, ...], int, Arrangement | None]:
    """The pieces one below the other, the bytes of a row of what they give, and how that is put in order."""
    if mapped.strided:
        made = strided(model, mapped, numbered)
        return made.strips, made.row_bytes, (MadePlain if made.packed else StridedCopy)(mapped, False)
    position, strips = 0, []
    for piece in mapped.pieces:
        strips.append(strip_of(model, piece, position, row_bytes, numbered))
        position += piece.count
    return tuple(joined(strips)), row_bytes, None
