"""Plans a Hugging Face folder from its tensors' parts: dtypes, block-scaled FP8, files, headers, config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from megabatch.converters.adapters.merge import UNTIED, Merged
from megabatch.converters.auxiliary_files import replaced_config
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.dtypes import FP8
from megabatch.converters.engine.plan import AuxiliaryFiles, Numbered, Plan, SmallFile, Strip, TargetFile, Tensor
from megabatch.converters.family import Family
from megabatch.converters.hf_model import read_config
from megabatch.converters.mapping import ExpertLayout, Experts, elements
from megabatch.converters.quantised import SUFFIX, Quantised, as_deepseek_v3, quantised
from megabatch.converters.requantise import Parts, requantised
from megabatch.converters.safetensors_io import HfFolder, split_shards
from megabatch.converters.safetensors_io.folder import INDEX, has_safetensors
from megabatch.converters.safetensors_io.header import Extent, build_header
from megabatch.converters.safetensors_io.sharding import index_json
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

SHARD_SIZE = "5GB"
"""Default size limit of a safetensors file."""


@dataclass(frozen=True, slots=True)
class HfForm:
    """How a Hugging Face folder is written."""

    dtype: str | None = None
    """safetensors' name of the dtype to cast weights to, None for their own."""
    max_shard_size: str | int | None = None
    """Largest safetensors file, None for 5 GB."""
    expert_layout: ExpertLayout | None = None
    fp8: bool = False
    """Block-scaled FP8 for the weights of linear layers."""


def layout_of(family: Family, shape: ModelShape, form: HfForm) -> ExpertLayout:
    """The layout of experts to write; by default one tensor for each.

    Raises: ConversionError when the model cannot be written in the layout that is asked for, or no reader of fused
    FP8 experts is known: transformers, on a CPU, would leave their scales aside.
    """
    layout = form.expert_layout
    experts = [row for row in family.rows if isinstance(row, Experts) and shape.num_experts]
    fused_only = any(not row.one_by_one for row in experts)
    if layout is not None and not experts:
        raise ConversionError(f"expert_layout={layout}: {shape.architecture} has no experts; leave it out")
    if layout == "per_expert" and fused_only:
        raise ConversionError(f"expert_layout={layout}: {shape.architecture} has fused experts only")
    if form.fp8 and (layout == "fused" or fused_only):
        raise ConversionError(
            "fp8_quantise: block-scaled FP8 is not supported with fused experts; write them one by one"
        )
    return layout or "per_expert"


def plan_folder(
    direction: str,
    source: Path,
    *,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    copies: Mapping[str, str],
    parts: Mapping[str, Parts],
    numbered: Numbered,
    reference: Path,
    form: HfForm,
    ignored: Mapping[str, str],
    merged: Merged | None = None,
) -> Plan:
    """Args: copies: tensors that repeat another one, with its name. parts: of each tensor in `shapes`, lying nowhere
    yet. reference: where config.json and the like come from, and parts of the model that are not converted. merged:
    what adapters add to the parts.
    """
    if merged is not None:
        shapes, parts = merged.folder(shapes, parts, fp8=form.fp8)
        copies, ignored = merged.copies(copies), {**ignored, **merged.aside}
    how = _way_of_quantising(reference) if form.fp8 else None
    entries: dict[str, TensorInfo] = {}
    placed: dict[str, Parts] = {}
    for name, shape in [*shapes.items(), *((name, shapes[of]) for name, of in copies.items())]:
        for made, info, own in _written(name, shape, parts[copies.get(name, name)], how):
            entries[made], placed[made] = info, own
    for name, tensor in _carried(family, reference, numbered):
        entries[name], placed[name] = TensorInfo(tensor.dtype, tensor.shape), [tensor]
    return plan_files(
        direction,
        source,
        entries=entries,
        parts=placed,
        numbered=numbered,
        reference=reference,
        max_shard_size=form.max_shard_size,
        replaced=_config(reference, entries, form, how, merged),
        ignored=ignored,
    )


def plan_files(
    direction: str,
    source: Path,
    *,
    entries: Mapping[str, TensorInfo],
    parts: Mapping[str, Parts],
    numbered: Numbered,
    reference: Path,
    max_shard_size: str | int | None,
    replaced: Mapping[str, bytes] = MappingProxyType({}),
    ignored: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Args: parts: of each tensor in `entries`, lying nowhere yet. replaced: files written in place of the reference's
    own.
    """
    shards = split_shards(entries, max_shard_size=SHARD_SIZE if max_shard_size is None else max_shard_size)
    tensors: list[Tensor] = []
    files: list[TargetFile] = []
    for number, shard in enumerate(shards):
        head, extents = build_header(shard.entries, metadata={"format": "pt"})
        files.append(TargetFile(shard.name, len(head) + sum(extent.size for extent in extents.values()), head))
        for name, extent in extents.items():
            tensors += _placed(parts[name], name, number, extent)
    return Plan(
        direction=direction,
        source=source,
        sources=numbered.files,
        files=files,
        tensors=tensors,
        small=[SmallFile(INDEX, lambda: index_json(shards))] if len(shards) > 1 else [],
        auxiliary=AuxiliaryFiles(reference, replaced),
        ignored=ignored,
    )


def _way_of_quantising(reference: Path) -> Quantised:
    """The reference folder's own, else DeepSeek-V3's."""
    how = quantised(read_config(reference))
    return how if isinstance(how, Quantised) else as_deepseek_v3()


def _written(
    name: str, shape: tuple[int, ...], parts: Parts, how: Quantised | None
) -> Iterator[tuple[str, TensorInfo, Parts]]:
    """A tensor as written to the folder: itself, or FP8 and scales."""
    if how is not None and how.takes(name, shape):
        yield from requantised(name, shape, parts, how)
    else:
        yield name, TensorInfo(parts[0].dtype, shape), parts


def _config(
    reference: Path, entries: Mapping[str, TensorInfo], form: HfForm, how: Quantised | None, merged: Merged | None
) -> dict[str, bytes]:
    """config.json with the weights' dtype and how they are quantised, where the reference's own would be wrong."""
    changes = UNTIED if merged is not None and merged.untied else {}
    if how is not None:
        plain = (name for name, info in entries.items() if len(info.shape) == 2 and not _is_of_fp8(name, entries))
        return replaced_config(
            reference, dtype=form.dtype or _usual(entries), changes={"quantization_config": how.written(plain)}
        )
    if quantised(read_config(reference)) is not None:
        return replaced_config(
            reference, dtype=form.dtype or _usual(entries), changes={"quantization_config": None, **changes}
        )
    return replaced_config(reference, dtype=form.dtype, changes=changes)


def _is_of_fp8(name: str, entries: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is quantised, or the scales of such a one."""
    weight = entries.get(name.removesuffix(SUFFIX))
    return weight is not None and weight.dtype == FP8


def _usual(entries: Mapping[str, TensorInfo]) -> str:
    """The most common dtype among tensors that are not quantised."""
    dtypes = [info.dtype for name, info in entries.items() if not _is_of_fp8(name, entries)]
    return max(sorted(set(dtypes)), key=dtypes.count)


def _placed(parts: Parts, name: str, file: int, extent: Extent) -> Iterator[Tensor]:
    """The parts of a tensor, by leading index, one behind the other."""
    if sum(part.data_bytes for part in parts) != extent.size:
        raise ConversionError(
            f"{name} {list(extent.info.shape)}: its parts have other sizes; this is a bug in megabatch"
        )
    at = extent.start
    for index, part in enumerate(parts):
        yield part._replace(name=name if len(parts) == 1 else f"{name}[{index}]", file=file, offset=at)
        at += part.data_bytes


def _carried(family: Family, reference: Path, numbered: Numbered) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a part of the model that is not converted, from the reference folder.

    Raises: ConversionError when the model has such a part and the folder no weights.
    """
    if family.carried is None:
        return
    if not has_safetensors(reference):
        raise ConversionError(
            f"{reference}: {family.name} is converted in its language part, and its other parts are not in the "
            "checkpoint; name the Hugging Face folder that has them as --model"
        )
    with HfFolder(reference) as folder:
        for name in folder.names:
            if re.fullmatch(family.carried, name):
                yield name, whole_tensor(folder, name, numbered)


def whole_tensor(folder: HfFolder, name: str, numbered: Numbered) -> Tensor:
    """A tensor that goes as it is, lying nowhere yet."""
    info, (path, offset, size) = folder.info(name), folder.extent(name)
    rows = max(1, elements(info.shape[:-1]))
    strip = Strip(0, rows, numbered.number(path), offset, 0, size // rows)
    return Tensor(name, 0, 0, info.shape, info.dtype, info.dtype, rows, size // rows, size // rows, (strip,))
