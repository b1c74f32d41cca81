"""A PEFT adapter folder, read strictly: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

from megabatch.converters.adapters.adapter import Adapter, Tables, Whole
from megabatch.converters.adapters.config import NAME, AdapterConfig, read_config
from megabatch.converters.adapters.names import BASE, Name, Side, parse
from megabatch.converters.bijection import FLOATS
from megabatch.converters.engine.gather import chunks
from megabatch.converters.engine.plan import Matrix, Numbered, Strip
from megabatch.converters.engine.sources import Sources
from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io.header import ITEMSIZE, Extent, read_header
from megabatch.converters.torch_bin import read_bin
from megabatch.errors import ConversionError

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

_CLASSES = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
_SAVED, _ORIGINAL = ".modules_to_save.", ".original_module."
_WRAPPERS = {
    _SAVED: "it repeats the module's own tensor",
    _ORIGINAL: "the base model has this, and the adapter replaces it",
}


def is_peft(folder: Path) -> bool:
    """Whether a folder is one of PEFT's."""
    return (folder / WEIGHTS).exists() or (folder / PICKLED).exists()


def open_peft(folder: Path, tables: Tables, numbered: Numbered, *, accept_bin: bool = False) -> Adapter:
    """Opens an adapter and checks that each of its tensors belongs to the base model.

    `accept_bin` reads adapter_model.bin where there is nothing else, as data.
    Raises: ConversionError naming those that do not.
    """
    weights = folder / WEIGHTS
    if weights.exists():
        extents = read_header(weights)
    elif accept_bin:
        weights = folder / PICKLED
        extents = read_bin(weights)
    else:
        raise ConversionError(
            f"{folder / PICKLED}: is a pickle, which can run code when it is loaded, and is refused by default; "
            "megabatch-convert --accept_bin reads it as data: with --to_hf --adapters it writes it as safetensors"
        )
    return _Reader(weights, extents, read_config(folder / NAME), tables, numbered).read()


class _Reader:
    """Reads one folder into an `Adapter`."""

    def __init__(
        self, path: Path, extents: dict[str, Extent], config: AdapterConfig, tables: Tables, numbered: Numbered
    ) -> None:
        self._path, self._extents, self._config, self._tables = path, extents, config, tables
        self._file = numbered.number(path)
        self._adapter = Adapter(path.parent, config, tables, numbered.files)

    def read(self) -> Adapter:
        pairs: dict[tuple[str, bool], dict[Side, str]] = {}
        wrapped = dict(self._of_wrappers())
        for name, extent in self._extents.items():
            if name in wrapped:
                continue
            parsed = self._parsed(name, extent)
            if parsed.side is None:
                self._whole(name, parsed.module, extent)
            else:
                pairs.setdefault((parsed.module, parsed.embedding), {})[parsed.side] = name
        for (module, embedding), sides in pairs.items():
            if len(sides) < 2:
                there = next(iter(sides.values()))
                raise self._fault(there, f"its lora_{'B' if 'A' in sides else 'A'} is missing")
            self._pair(module, sides["A"], sides["B"], embedding=embedding)
        for blocks in self._adapter.blocks.values():
            blocks.sort(key=lambda block: block.spans[0].row)
        self._check_whole()
        if not self._extents:
            raise ConversionError(f"{self._path}: has no tensors")
        return self._adapter

    def _of_wrappers(self) -> Iterator[tuple[str, str]]:
        """The tensors inside of PEFT's wrappers of `modules_to_save`, which it saves beside the module's own once the
        vocabulary has grown. Raises: ConversionError for a copy that differs from it."""
        for name, extent in self._extents.items():
            for part, why in _WRAPPERS.items():
                own = name.replace(part, ".")
                if part not in name:
                    continue
                found = self._extents.get(own)
                if found is None:
                    raise self._fault(name, f"{own}, the module's own, is not there")
                if found.info != extent.info or (part == _SAVED and not self._same(extent, found)):
                    raise self._fault(name, f"differs from {own}, of which it must be a copy")
                self._adapter.aside[name] = why
                yield name, own

    def _same(self, one: Extent, other: Extent) -> bool:
        strips = [(Strip(0, 1, self._file, extent.start, 0, extent.size),) for extent in (one, other)]
        with Sources(self._adapter.sources) as sources:
            return all(a == b for a, b in zip(*(chunks(sources, own) for own in strips), strict=True))

    def _parsed(self, name: str, extent: Extent) -> Name:
        if extent.info.dtype not in FLOATS:
            raise self._fault(name, f"its dtype must be one of {', '.join(FLOATS)}")
        try:
            return parse(name)
        except ConversionError as error:
            raise ConversionError(f"{self._path}: {error}") from error

    def _fault(self, name: str, what: str) -> ConversionError:
        info = self._extents[name].info
        return ConversionError(f"{self._path}: {name} {list(info.shape)} {info.dtype}: {what}")

    def _whole(self, name: str, tensor: str, extent: Extent) -> None:
        shape = self._tables.shapes.get(tensor)
        if shape is None:
            raise self._fault(name, f"the base model has no tensor {tensor}{self._hint(tensor)}")
        if shape != extent.info.shape:
            self._check_vocabulary(name, extent.info.shape[:1], tensor)
            raise self._fault(name, f"the base model's {tensor} is {list(shape)}")
        rows = shape[0] * (shape[1] if tensor in self._tables.stacks else 1)
        size = elements(shape) // rows * ITEMSIZE[extent.info.dtype]
        strip = Strip(0, rows, self._file, extent.start, 0, size)
        self._adapter.whole[tensor] = Whole(shape, extent.info.dtype, (strip,))

    def _hint(self, tensor: str) -> str:
        kind = _CLASSES.get(str(self._config.values.get("task_type")))
        if kind is not None and not self._tables.shape.num_labels:
            return (
                f": the adapter classifies {kind}s, and config.json gives {self._tables.shape.architecture}; load the "
                f"base with AutoModelFor{kind.title()}Classification, save it, and name that folder as --model"
            )
        return _near(tensor, self._tables.shapes)

    def _pair(self, module: str, a: str, b: str, *, embedding: bool) -> None:
        stacked = self._parameters(module)
        if stacked is not None:
            self._stacked(stacked, a, b)
            return
        weight = f"{module}.weight"
        shape = self._tables.shapes.get(weight)
        if shape is None or len(shape) != 2:
            known = [name.removesuffix(".weight") for name, dims in self._tables.shapes.items() if len(dims) == 2]
            raise self._fault(a, f"the base model has no linear layer or embedding {module}{_near(module, known)}")
        key = weight if self._config.targets_parameter(weight) else module
        self._check_targeted(a, key, parameter=key == weight)
        rank = self._config.rank(key)
        if self._extents[a].info.shape[:1] != (rank,):
            raise self._fault(a, f"{NAME} gives {key} rank {rank}")
        rows, columns = shape
        grown, axis = (a, -1) if embedding else (b, 0)
        self._check_vocabulary(grown, self._extents[grown].info.shape[axis:][:1], weight)
        self._check_shape(a, (rank, rows if embedding else columns))
        self._check_shape(b, (columns if embedding else rows, rank))
        left, right = self._matrix(b), self._matrix(a)
        if embedding:
            left, right = (matrix._replace(transposed=True) for matrix in (right, left))
        self._add((weight, None), left, right, self._config.scale(key, rank))

    def _parameters(self, module: str) -> str | None:
        """The stacked tensor that these adapters belong to, or None for a module with a single weight."""
        owner = module
        while owner.endswith(BASE):
            owner = owner.removesuffix(BASE)
        depth = (len(module) - len(owner)) // len(BASE)
        own = [name for name in self._tables.stacks if name.rpartition(".")[0] == owner]
        wanted = [name for name in own if self._config.targets_parameter(name)]
        if depth >= len(wanted):
            return None
        return wanted[-1 - depth]

    def _stacked(self, name: str, a: str, b: str) -> None:
        """All experts' adapters of one parameter: A has an expert's rows one below the other, and in B an expert's
        columns lie `experts` apart."""
        experts, shape = self._tables.stacks[name], self._tables.shapes[name]
        if len(shape) != 3:
            raise self._fault(a, f"adapters of {name} {list(shape)} are not supported")
        mapped = next(iter(self._tables.users((name, 0))))
        # outputs and inputs, as a linear layer has them
        rows, columns = shape[:0:-1] if mapped.strided and next(mapped.pieces).transposed else shape[1:]
        ranks = self._extents[a].info.shape[:1]
        rank = self._config.rank(name)
        if ranks != (experts * rank,):
            raise self._fault(a, f"{NAME} gives rank {rank} to each of the {experts} experts of {name}")
        self._check_shape(a, (experts * rank, columns))
        self._check_shape(b, (rows, rank * experts))
        whole, all_ = self._matrix(b), self._matrix(a)
        size = rank * columns * ITEMSIZE[all_.dtype]
        for expert in range(experts):
            left = whole._replace(pick=(expert, whole.columns, experts))
            strip = all_.strips[0]._replace(offset=all_.strips[0].offset + expert * size, rows=rank)
            right = all_._replace(rows=rank, strips=(strip,))
            self._add((name, expert), left, right, self._config.scale(name, rank))

    def _add(self, part: tuple[str, int | None], left: Matrix, right: Matrix, scale: float) -> None:
        for target, block in self._tables.block(part, left, right, scale):
            self._adapter.blocks.setdefault(target, []).append(block)

    def _check_shape(self, name: str, shape: tuple[int, int]) -> None:
        if self._extents[name].info.shape != shape:
            raise self._fault(name, f"{list(shape)} is needed for its layer of the base model")

    def _check_targeted(self, name: str, key: str, *, parameter: bool) -> None:
        tied = self._config.values.get("ensure_weight_tying")
        if not parameter and not tied and not self._config.targets(key):
            raise self._fault(name, f"{NAME} does not give {key} an adapter: target_modules does not name it")

    def _check_vocabulary(self, name: str, found: tuple[int, ...], weight: str) -> None:
        """Raises: ConversionError for an adapter trained after its vocabulary had grown to the rows found here."""
        shape, rows = self._tables.shapes[weight], max(found, default=0)
        of_vocabulary = any(mapped.split == "vocab" for mapped in self._tables.users((weight, None)))
        if of_vocabulary and rows > shape[0]:
            raise self._fault(
                name,
                f"the adapter was trained when {weight} had {rows} rows, and the base model's has {shape[0]}: resize "
                f"the base first, by {rows - shape[0]} to {rows} (model.resize_token_embeddings({rows}), "
                "model.save_pretrained(...)), and name that folder as --model",
            )

    def _check_whole(self) -> None:
        """Every name of `modules_to_save` has a tensor, unless the base model has no such module: PEFT itself adds
        `classifier` and `score` where sequences are classified, of which a model has one."""
        there = {name.rpartition(".")[0] for name in self._tables.shapes}
        modules = {name.rpartition(".")[0] for name in self._adapter.whole}
        for wanted in self._config.modules_to_save:
            if not any(module.endswith(wanted) for module in modules) and any(map(_ends_with(wanted), there)):
                raise ConversionError(
                    f"{self._path}: {NAME} names {wanted} in modules_to_save, but no tensor belongs to it"
                )

    def _matrix(self, name: str) -> Matrix:
        extent = self._extents[name]
        rows, columns = extent.info.shape
        size = columns * ITEMSIZE[extent.info.dtype]
        strip = Strip(0, rows, self._file, extent.start, 0, size)
        return Matrix(rows, columns, extent.info.dtype, (strip,), name=name)


def _ends_with(end: str) -> Callable[[str], bool]:
    return lambda module: module.endswith(end)


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names)[:4000], n=1, cutoff=0.7)
    return f"; the nearest is {near[0]}" if near else ""
