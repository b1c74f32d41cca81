"""An adapter in a torch_dist checkpoint: two tensors for each adapted layer of megatron-core, and its config.

`decoder.layers.3.self_attention.linear_qkv.lora_A.weight` is [rank, columns] and `.lora_B.weight` [rows, rank],
stacked over layers and experts as the weights are, cut by tensor parallelism in any way; an embedding's have PEFT's
names and shapes (`lora_embedding_A` [rank, vocabulary]). Whole tensors (`modules_to_save`, biases) have the model's
own names.
adapter_config.json is PEFT's, in Hugging Face's names. Where a layer is several of Hugging Face's (qkv, gate and up),
they share A when its rank is theirs; when its rank is the sum of theirs, each has its own rows of A, and of B its own
columns, or, as the trainer saves it, the same columns of its own rows. The trainer's B has the rows of adapted parts
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megabatch.converters.adapters.adapter import Adapter, Block, Part, Span, Tables, Whole, spans_by_part
from megabatch.converters.adapters.config import NAME, AdapterConfig, read_config
from megabatch.converters.bijection import FLOATS
from megabatch.converters.engine.gather import matrix_bytes, sliced
from megabatch.converters.engine.plan import Matrix, Numbered, Strip
from megabatch.converters.engine.sources import Sources
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.torch_dist.aliases import is_optimizer, unwrapped
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.keys import cell
from megabatch.errors import ConversionError

SPELLINGS = (
    (".adapter.linear_in.", ".lora_A."), (".adapter.linear_out.", ".lora_B."),  # Megatron-Bridge
    (".lora_A.default.", ".lora_A."), (".lora_B.default.", ".lora_B."),  # ms-swift
    (".lora_embedding_A.default", ".lora_embedding_A"), (".lora_embedding_B.default", ".lora_embedding_B"),
    (".base_layer.", "."), (".to_wrap.", "."),
)  # fmt: skip
"""Parts of keys that other programs write, and ours."""
LOW_RANK = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_SHOWN = 8


def suffixes(mapped: Mapped) -> tuple[str, str]:
    """What the names of a tensor's A and B end with, in place of `weight`."""
    return EMBEDDING if mapped.name.startswith("embedding.") else LOW_RANK


def low_rank_names(mapped: Mapped) -> tuple[str, str]:
    """The names of a layer's A and B; `gate_weight`, a parameter without a module of its own, is the layer `gate`."""
    stem = mapped.name.removesuffix("weight")
    if stem == mapped.name:
        raise ConversionError(
            f"{mapped.name}: is not the weight of a layer that can have an adapter; this is a bug in megabatch"
        )
    a, b = suffixes(mapped)
    stem = f"{stem[:-1]}." if stem.endswith("_") else stem
    return stem + a, stem + b


def find_config(given: Path, checkpoint: Path) -> Path:
    """The adapter_config.json that belongs to a checkpoint. Raises: ConversionError when there is none."""
    for place in (given, given / "hf", checkpoint, checkpoint.parent, checkpoint.parent / "hf"):
        if (place / NAME).is_file():
            return place / NAME
    raise ConversionError(
        f"{given}: there is no {NAME} beside this checkpoint, which gives its adapters' ranks and scales; "
        "write one in PEFT's terms (peft_type, r, lora_alpha, target_modules in Hugging Face's names)"
    )


def open_mcore(given: Path, tables: Tables, numbered: Numbered) -> Adapter:
    """Opens an adapter and checks that each of its tensors belongs to the base model.

    Raises: ConversionError naming those that do not.
    """
    checkpoint = find_torch_dist(given)
    config = read_config(find_config(given, checkpoint))
    source = TorchDistFolder(checkpoint)
    try:
        return _Reader(source, config, tables, numbered).read()
    finally:
        source.close()


@dataclass(slots=True)
class _Found:
    """The rows found so far of a whole Hugging Face tensor."""

    dtype: str
    mapped: Mapped
    """The first tensor that has rows of it."""
    rows: int = 0
    strips: list[Strip] = field(default_factory=list)


class _Reader:
    """Reads one checkpoint into an `Adapter`."""

    def __init__(self, source: TorchDistFolder, config: AdapterConfig, tables: Tables, numbered: Numbered) -> None:
        source.rename(unwrapped([key for key in source.entries if not is_optimizer(key)]))
        source.rename({key: _respelled(key) for key in source.entries})
        self._source, self._config, self._tables, self._numbered = source, config, tables, numbered
        self._adapter = Adapter(source.path, config, tables, numbered.files)
        self._used: set[str] = set()
        self._wholes: dict[str, _Found] = {}

    def read(self) -> Adapter:
        for mapped in self._tables.tables["per_expert"]:
            self._low_rank(mapped)
            for part in self._tables.tensors_of(mapped):
                self._whole(part)
        self._add_whole()
        left = [key for key in self._source.entries if key not in self._used and not is_optimizer(key)]
        if left:
            more = f"\n  and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            lines = (f"{key} {list(self._source.entries[key].size)} belongs to no layer" for key in left[:_SHOWN])
            raise ConversionError(f"{self._source.path}: does not fit the base model\n  " + "\n  ".join(lines) + more)
        if not self._adapter.blocks and not self._adapter.whole:
            raise ConversionError(f"{self._source.path}: has no adapters")
        return self._adapter

    def _low_rank(self, mapped: Mapped) -> None:
        if len(mapped.shape) != 2 or not mapped.name.endswith("weight"):
            return
        names = low_rank_names(mapped)
        a, b = (self._matrix(replace(mapped, name=name)) for name in names)
        if a is None and b is None:
            return
        if a is None or b is None:
            raise self._fault(mapped, f"has only one of {' and '.join(names)}")
        if suffixes(mapped) == EMBEDDING:
            left = a._replace(transposed=True, pick=(0, mapped.shape[0], 1) if a.columns > mapped.shape[0] else None)
            self._check(mapped, left, b._replace(transposed=True))
            self._add(mapped, next(iter(spans_by_part(mapped))), left, b._replace(transposed=True))
            return
        if not self._compact(mapped, a, b):
            self._check(mapped, b, a)
            self._fused(mapped, a, b)

    def _compact(self, mapped: Mapped, a: Matrix, b: Matrix) -> bool:
        """Adds adapters whose B has the rows of adapted tensors alone, if these are such."""
        parts = self._parts(mapped)
        rows = sum(span.rows for spans in parts.values() for span in spans)
        ranks = {self._config.rank(self._key(part)) for part in parts}
        shares_a = a.rows == b.columns
        if (shares_a and b.rows == mapped.shape[0]) or a.columns != mapped.shape[1]:
            return False
        if (a.rows, b.rows, ranks) != ((1 if shares_a else len(parts)) * b.columns, rows, {b.columns}):
            return False
        order = sorted((span, part) for part, spans in parts.items() for span in spans)
        strips: dict[Part, list[Strip]] = {part: [] for part in parts}
        first = 0
        for span, part in order:
            strips[part] += sliced(b.strips, first, span.rows, row=span.first)
            first += span.rows
        for number, part in enumerate(parts):
            own = sliced(a.strips, 0 if shares_a else number * b.columns, b.columns, row=0)
            right = a._replace(rows=b.columns, strips=tuple(own))
            height = max(span.first + span.rows for span in parts[part])
            below = tuple(sorted(strips[part], key=lambda strip: strip.row))
            self._add(mapped, part, b._replace(rows=height, strips=below), right)
        return True

    def _check(self, mapped: Mapped, left: Matrix, right: Matrix) -> None:
        (rows, rank), (other, columns) = left.shape, right.shape
        padded = mapped.split == "vocab" and rows >= mapped.shape[0]
        if (rank, columns) != (other, mapped.shape[1]) or (rows != mapped.shape[0] and not padded):
            raise self._fault(
                mapped, f"has A [{other}, {columns}] and B [{rows}, {rank}], which do not match {list(mapped.shape)}"
            )

    def _fused(self, mapped: Mapped, a: Matrix, b: Matrix) -> None:
        """The layer's adapter as those of the Hugging Face tensors in it."""
        parts = self._parts(mapped)
        ranks = [self._config.rank(self._key(part)) for part in parts]
        if all(rank == a.rows for rank in ranks) and parts:
            self._check_zero(mapped, b, [(row, 0, b.columns) for row in _outside(mapped, parts.values())])
            for part, spans in parts.items():
                self._add(mapped, part, self._gathered(mapped, part, spans, b), a)
            return
        if sum(ranks) != a.rows:
            wanted = ", ".join(f"{self._key(part)} {rank}" for part, rank in zip(parts, ranks, strict=True))
            raise self._fault(
                mapped, f"has adapters of rank {a.rows}, {self._config.path.name} gives {wanted or 'it none'}"
            )
        self._stacked(mapped, a, b, dict(zip(parts, ranks, strict=True)))

    def _stacked(self, mapped: Mapped, a: Matrix, b: Matrix, ranks: dict[Part, int]) -> None:
        parts, first = self._parts(mapped), 0
        zero = [(row, 0, b.columns) for row in _outside(mapped, parts.values())]
        for part, rank in ranks.items():
            last = first + rank
            rows = [row for span in parts[part] for row in range(span.row, span.row + span.rows)]
            zero += [(row, begin, end) for row in rows for begin, end in ((0, first), (last, b.columns))]
            right = a._replace(rows=rank, strips=tuple(sliced(a.strips, first, rank, row=0)))
            left = self._gathered(mapped, part, parts[part], b)._replace(pick=(first, last, 1))
            self._add(mapped, part, left, right)
            first = last
        self._check_zero(mapped, b, zero)

    def _parts(self, mapped: Mapped) -> dict[Part, list[Span]]:
        """The Hugging Face tensors in a layer that have adapters, by what the config targets."""
        fused = spans_by_part(self._tables.by_target["fused"][mapped.name, mapped.expert])
        if any(name in self._tables.stacks and self._config.targets_parameter(name) for name, _ in fused):
            return fused
        parts = spans_by_part(mapped)
        return {
            part: spans
            for part, spans in parts.items()
            if self._config.targets_parameter(part[0]) or self._config.targets(part[0].removesuffix(".weight"))
        }

    def _key(self, part: Part) -> str:
        return part[0] if self._config.targets_parameter(part[0]) else part[0].removesuffix(".weight")

    def _gathered(self, mapped: Mapped, part: Part, spans: list[Span], b: Matrix) -> Matrix:
        """The rows of B that belong to a Hugging Face tensor, in its order."""
        if any(span.every != 1 for span in spans):
            raise self._fault(mapped, f"has adapters, and {part[0]} has its rows in another order: not supported")
        strips = [strip for span in spans for strip in sliced(b.strips, span.row, span.rows, row=span.first)]
        rows = max(span.first + span.rows for span in spans)
        return b._replace(rows=rows, strips=tuple(sorted(strips, key=lambda strip: strip.row)))

    def _check_zero(self, mapped: Mapped, b: Matrix, ranges: list[tuple[int, int, int]]) -> None:
        """Checks that rows of B are zero between two columns: these rows belong to layers without this adapter."""
        if not any(begin < end for _, begin, end in ranges):
            return
        with Sources(self._numbered.files) as sources:
            data = matrix_bytes(sources, b)
        size = ITEMSIZE[b.dtype]
        for row, begin, end in ranges:
            if any(data[(row * b.columns + begin) * size : (row * b.columns + end) * size]):
                raise self._fault(
                    mapped,
                    f"has adapters that {self._config.path.name} does not target, or of another rank than it says",
                )

    def _add(self, mapped: Mapped, part: Part, left: Matrix, right: Matrix) -> None:
        table = self._tables.by_target["fused" if part[0] in self._tables.stacks else "per_expert"]
        spans = tuple(spans_by_part(table[mapped.name, mapped.expert])[part])
        scale = self._config.scale(self._key(part), right.shape[0])
        self._adapter.blocks.setdefault((mapped.name, mapped.expert), []).append(
            Block(part, spans, left, right, scale)
        )

    def _whole(self, mapped: Mapped) -> None:
        found = self._find(mapped)
        if found is None:
            return
        if mapped.offset or mapped.strided or mapped.expert is not None:
            raise self._fault(mapped, "is a whole tensor, which is not supported of this layer")
        strips, dtype = self._strips(*found)
        for (name, _), spans in spans_by_part(mapped).items():
            found_of = self._wholes.setdefault(name, _Found(dtype, mapped))
            if found_of.dtype != dtype:
                raise self._fault(mapped, f"is {dtype}, and {found_of.mapped.name}, also of {name}, {found_of.dtype}")
            for span in spans:
                found_of.strips += sliced(strips, span.row, span.rows, row=span.first)
                found_of.rows += span.rows

    def _add_whole(self) -> None:
        """The whole tensors, some of which are several of megatron-core's."""
        for name, found in self._wholes.items():
            shape = self._tables.shapes[name]
            if found.rows != shape[0]:
                raise self._fault(found.mapped, f"there are {found.rows} of the {shape[0]} rows of {name}")
            found.strips.sort(key=lambda strip: strip.row)
            self._adapter.whole[name] = Whole(shape, found.dtype, tuple(found.strips))

    def _matrix(self, mapped: Mapped) -> Matrix | None:
        found = self._find(mapped)
        if found is None:
            return None
        key, lead = found
        size = self._source.entries[key].size[len(lead) :]
        if len(size) != 2:
            raise self._fault(mapped, f"{key} has shape {list(self._source.entries[key].size)}")
        strips, dtype = self._strips(key, lead)
        return Matrix(size[0], size[1], dtype, strips, name=key)

    def _find(self, mapped: Mapped) -> tuple[str, tuple[int, ...]] | None:
        """Key and index of a tensor, stacked over layers or not."""
        for stacked in (True, False):
            place = cell(mapped, self._tables.shape, stacked=stacked)
            entry = self._source.entries.get(place.key)
            if entry is not None:
                if entry.size[: len(place.axes)] != place.axes:
                    raise self._fault(
                        mapped, f"{place.key} has shape {list(entry.size)}, not {list(place.axes)} of them"
                    )
                self._used.add(place.key)
                return place.key, place.lead
        return None

    def _strips(self, key: str, lead: tuple[int, ...]) -> tuple[tuple[Strip, ...], str]:
        dtype = self._source.dtype(key)
        if dtype not in FLOATS:
            raise ConversionError(f"{self._source.path}: {key} is {dtype}, which must be one of {', '.join(FLOATS)}")
        unit = elements(self._source.entries[key].size[len(lead) + 2 :]) * ITEMSIZE[dtype]
        return tuple(self._of_blocks(key, lead, unit)), dtype

    def _of_blocks(self, key: str, lead: tuple[int, ...], unit: int) -> Iterator[Strip]:
        for block in self._source.blocks(key, lead):
            (start, stop), (left, right) = block.rows, block.cols
            number = self._numbered.number(block.path)
            yield Strip(start, stop - start, number, block.offset, left * unit, (right - left) * unit)

    def _fault(self, mapped: Mapped, what: str) -> ConversionError:
        name = mapped.name if mapped.expert is None else f"{mapped.name} of expert {mapped.expert}"
        return ConversionError(f"{self._source.path}: {name} {list(mapped.shape)}: {what}")


def _outside(mapped: Mapped, parts: Iterable[list[Span]]) -> Iterable[int]:
    """Rows that belong to none of the parts."""
    spans = [span for own in parts for span in own]
    if sum(span.rows for span in spans) == mapped.shape[0]:
        return ()
    inside = {row for span in spans for row in range(span.row, span.row + span.rows)}
    return [row for row in range(mapped.shape[0]) if row not in inside]


def _respelled(key: str) -> str:
    for theirs, ours in SPELLINGS:
        key = key.replace(theirs, ours)
    return key
