"""Plans PEFT adapter → torch_dist checkpoint of adapters. `mcore_folder` says what its tensors are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megabatch.converters.adapters.adapter import Adapter, Block, Span, Tables
from megabatch.converters.adapters.config import NAME
from megabatch.converters.adapters.expert_order import ExpertsApart
from megabatch.converters.adapters.mcore_folder import EMBEDDING, low_rank_names, suffixes
from megabatch.converters.adapters.open import base_model_of, open_adapters
from megabatch.converters.adapters.pairs import Rows, joined, tensor_of
from megabatch.converters.auxiliary_files import auxiliary_files
from megabatch.converters.engine.gather import sliced
from megabatch.converters.engine.plan import Numbered, Plan, SmallFile, Tensor, uncollected
from megabatch.converters.engine.sources import Sources
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import read_config
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.regular_files import INDEX_BYTES, read_regular
from megabatch.converters.request import Path_
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.torch_dist.archive import archive_of
from megabatch.converters.torch_dist.keys import Cell, LayerKeys, cell, stacks_layers
from megabatch.converters.torch_dist.layout import Item, lay_out
from megabatch.errors import ConversionError
from megabatch.saved.find import RELEASE, TRACKER

Made = tuple[Mapped, Tensor]


def tables_of(base: Path_) -> Tables:
    """The table of a base model, from its config.json alone."""
    config = read_config(base)
    config.pop("quantization_config", None)
    family = family_of(config)
    return Tables(family, family.shape(config))


@uncollected()
def plan_adapter_to_mcore(
    adapter: Path_,
    base: Path_ | None = None,
    *,
    files: int | None = None,
    accept_bin: bool = False,
    layer_keys: LayerKeys | None = None,
) -> Plan:
    """Plans a checkpoint of an adapter. `base`: the Hugging Face folder of its model, whose weights are not read.

    `layer_keys`: as its model's checkpoint has them; layers that are not adapted alike have keys of their own always.

    Raises: ConversionError for anything that does not fit, before anything is written.
    """
    model = base_model_of(adapter) if base is None else Path(base)
    tables, numbered = tables_of(model), Numbered()
    (opened,) = open_adapters([adapter], tables, numbered, accept_bin=accept_bin)
    with Sources(numbered.files) as sources:
        made = list(_made(opened, sources))
    items = list(_items(made, tables, layer_keys))
    checkpoint = lay_out(items, prefix=f"{RELEASE}/", files=files)
    return Plan(
        direction="adapter_to_mcore",
        source=opened.path,
        sources=numbered.files,
        files=checkpoint.files,
        tensors=checkpoint.tensors,
        small=[
            *carried(opened.config.path.parent, ("config.json",)),
            SmallFile("config.json", partial(read_regular, model / "config.json")),
            SmallFile(NAME, partial(read_regular, opened.config.path)),
            SmallFile(TRACKER, RELEASE.encode),
            *checkpoint.small,
        ],
        auxiliary=None,
        ignored=opened.aside,
    )


def carried(folder: Path, skip: Sequence[str]) -> list[SmallFile]:
    """Tokenizer, chat template and the like that lie beside an adapter."""
    return [
        SmallFile(name.as_posix(), partial(read_regular, folder / name, most=INDEX_BYTES))
        for name in auxiliary_files(folder)
        if str(name) not in skip
    ]


def _made(adapter: Adapter, sources: Sources) -> Iterator[Made]:
    """Every tensor of the checkpoint with the name, layer, expert and shape that a canonical tensor has."""
    together: set[tuple[str, int | None]] = set()
    for target, mapped in adapter.tables.by_target["per_expert"].items():
        for part in adapter.tables.tensors_of(mapped):
            if (whole := _whole(adapter, part)) is not None:
                yield whole
        blocks = adapter.blocks.get(target)
        if blocks is None:
            continue
        if suffixes(mapped) == EMBEDDING:
            yield from _named(mapped, tensor_of(blocks[0].left), tensor_of(blocks[0].right))
        elif (left := blocks[0].left.pick) is not None and left[2] > 1:
            if (mapped.name, mapped.layer) not in together:
                together.add((mapped.name, mapped.layer))
                yield from _of_all_experts(adapter, mapped, blocks)
        else:
            rows = [Rows(block, span.row, span.rows, span.first) for block in blocks for span in _plain(mapped, block)]
            pair = joined(rows, mapped.shape[0], sources=sources, what=f"{adapter.path}: {mapped.name}")
            yield from _named(mapped, pair.a, pair.b)


def _plain(mapped: Mapped, block: Block) -> tuple[Span, ...]:
    if any(span.every != 1 for span in block.spans):
        raise ConversionError(
            f"{mapped.name}: {block.part[0]} has its rows in another order; its adapter can be merged with "
            "--to_mcore, not converted"
        )
    return block.spans


def _named(mapped: Mapped, a: Tensor, b: Tensor) -> Iterator[Made]:
    for name, tensor in zip(low_rank_names(mapped), (a, b), strict=True):
        yield replace(mapped, name=name, shape=tensor.shape), tensor


def _of_all_experts(adapter: Adapter, mapped: Mapped, blocks: list[Block]) -> Iterator[Made]:
    """A layer's adapters of all experts as PEFT has them, in one tensor: taken apart, they would be read over again
    for each expert."""
    block, experts = blocks[0], adapter.tables.shape.num_experts or 0
    _plain(mapped, block)
    if len(blocks) > 1 or block.spans != (Span(0, mapped.shape[0], 0, 1),):
        raise ConversionError(f"{mapped.name}: is adapted by more than {block.part[0]}: this is a bug in megabatch")
    right, left = block.right, block.left._replace(pick=None)
    strip = right.strips[0]
    stacked = right._replace(rows=right.rows * experts, strips=(strip._replace(rows=strip.rows * experts),))
    a, b = tensor_of(stacked), tensor_of(left)._replace(arrangement=ExpertsApart(experts))
    a = a._replace(shape=(experts, right.rows, right.columns))
    yield from _named(replace(mapped, expert=None), a, b._replace(shape=(experts, left.rows, right.rows)))


def _whole(adapter: Adapter, mapped: Mapped) -> Made | None:
    """A tensor of the model that the adapter brings itself. Raises: ConversionError when it brings a part of it."""
    names = {piece.hf: adapter.whole.get(piece.hf) for piece in mapped.pieces}
    there = [name for name, whole in names.items() if whole is not None]
    if not there:
        return None
    missing = [name for name, whole in names.items() if whole is None]
    dtypes = {whole.dtype for whole in names.values() if whole is not None}
    if missing or len(dtypes) > 1 or mapped.strided or mapped.offset or mapped.expert is not None:
        why = f"{', '.join(missing)} is missing" if missing else f"its parts are {' and '.join(sorted(dtypes))}"
        raise ConversionError(
            f"{adapter.path}: {', '.join(there)} is a part of {mapped.name}, which cannot be built from it ({why}); "
            "it can be merged"
        )
    strips, position = [], 0
    for piece in mapped.pieces:
        whole = names[piece.hf]
        assert whole is not None
        strips += sliced(whole.strips, piece.rows[0], piece.count, row=position)
        position += piece.count
    (dtype,) = dtypes
    size = elements(mapped.shape[1:]) * ITEMSIZE[dtype]
    return mapped, Tensor("", 0, 0, mapped.shape, dtype, dtype, mapped.shape[0], size, size, tuple(strips))


def _items(made: Sequence[Made], tables: Tables, layer_keys: LayerKeys | None) -> Iterator[Item]:
    """With their cells: stacked over layers when megatron-core stacks the model's and all layers have the same."""
    stacked = stacks_layers(tables.tied_shape, layer_keys) and _alike(made, tables)
    _check_experts(made, tables)
    for mapped, tensor in made:
        place = _cell(mapped, tables, stacked=stacked)
        shape = (*[1] * len(place.lead), *tensor.shape)
        name = mapped.name if mapped.expert is None else f"{mapped.name}[{mapped.expert}]"
        placed = tensor._replace(name=name, shape=shape, frame=archive_of(tensor.dtype, shape))
        yield Item(place, tensor.shape, placed, f"entry {mapped.entry}")


def _cell(mapped: Mapped, tables: Tables, *, stacked: bool) -> Cell:
    """As the weights' cell; a tensor of all experts has them as a dimension of its own."""
    if len(mapped.shape) < 3 or mapped.expert is not None or ".lora_" not in mapped.name:
        return cell(mapped, tables.shape, stacked=stacked)
    place = cell(replace(mapped, expert=0), tables.shape, stacked=stacked)
    return Cell(place.key, place.lead[:-1], place.axes[:-1])


def _alike(made: Sequence[Made], tables: Tables) -> bool:
    """Whether all layers have the same tensors, in the same shapes and dtypes."""
    layers: dict[int, set[object]] = defaultdict(set)
    for mapped, tensor in made:
        if mapped.layer is not None:
            name = mapped.name.replace(f".{mapped.layer}.", ".", 1)
            layers[mapped.layer].add((name, mapped.expert, tensor.shape, tensor.dtype))
    first = next(iter(layers.values()), set())
    return len(layers) in (0, tables.shape.num_layers) and all(own == first for own in layers.values())


def _check_experts(made: Sequence[Made], tables: Tables) -> None:
    """One tensor holds the adapters of a layer's experts. Raises: ConversionError when they are not alike."""
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for mapped, tensor in made:
        if mapped.expert is not None:
            shapes[mapped.name].append(tensor.shape)
    for name, found in shapes.items():
        if len(found) != tables.shape.num_experts or len(set(found)) > 1:
            ranks = sorted({min(shape) for shape in found})
            raise ConversionError(
                f"{name}: {len(found)} of {tables.shape.num_experts} experts have adapters, of ranks {ranks}; "
                "one tensor holds them all, so they must be alike"
            )
