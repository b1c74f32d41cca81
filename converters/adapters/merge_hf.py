"""A Hugging Face folder with adapters merged into its weights, planned; megatron-core's format is not gone through."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megabatch.converters.adapters.merge import merged_adapters
from megabatch.converters.dtypes import read_dtype
from megabatch.converters.engine.plan import Numbered, Plan, Strip, Tensor, uncollected
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.hf_output import HfForm, plan_folder
from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

Path_ = str | os.PathLike[str]


@uncollected()
def plan_merge(
    folder: Path_, adapters: Sequence[Path_], *, torch_dtype: str | None = None, max_shard_size: str | int = "5GB"
) -> Plan:
    """Plans the folder; experts are laid out as they are.

    Raises: ConversionError for whatever does not fit, before anything is written.
    """
    model = open_hf_model(folder)
    try:
        numbered = Numbered()
        merged = merged_adapters(adapters, model.family, model.shape, numbered)
        form = HfForm(read_dtype(torch_dtype), max_shard_size)
        stacks = {piece.hf for mapped in model.tensors for piece in mapped.pieces if piece.index is not None}
        fixed = {piece.hf for mapped in model.tensors for piece in mapped.pieces if mapped.dtype is not None}
        names = [name for name in model.folder.names if name not in model.carried and name not in model.ignored]
        copies = {name: of for name, of in model.family.copies(model.shape).items() if name in model.ignored}
        return plan_folder(
            "merge",
            Path(folder),
            family=model.family,
            shapes={name: model.folder.info(name).shape for name in names},
            copies=copies,
            parts={
                name: _parts(model, name, numbered, None if name in fixed else form.dtype, stacked=name in stacks)
                for name in names
            },
            numbered=numbered,
            reference=Path(folder),
            form=form,
            merged=merged,
            ignored={name: why for name, why in model.ignored.items() if name not in copies},
        )
    finally:
        model.folder.close()


def _parts(model: HfModel, name: str, numbered: Numbered, dtype: str | None, *, stacked: bool) -> list[Tensor]:
    """A tensor, or one for each leading index of it where it holds all experts."""
    path, offset, size = model.folder.extent(name)
    read, shape = model.folder.info(name)
    written = dtype or read
    lead, own = (shape[0], shape[1:]) if stacked else (1, shape)
    rows, columns = (own[0], elements(own[1:])) if own else (1, 1)
    source, number = columns * ITEMSIZE[read], numbered.number(path)
    if size != lead * rows * source:
        raise ConversionError(f"{name} {list(shape)} {read}: has {size} bytes; this is a fault of ours")
    return [
        Tensor(
            name=name,
            file=0,
            offset=0,
            shape=own,
            dtype=written,
            source_dtype=read,
            rows=rows,
            row_bytes=columns * ITEMSIZE[written],
            source_row_bytes=source,
            strips=(Strip(0, rows, number, offset + index * rows * source, 0, source),),
        )
        for index in range(lead)
    ]
