"""Plans adapter → PEFT folder: a module for each expert, or the stacked parameters of transformers 5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.adapter import Adapter, Block, Part, spans_by_part
from megabatch.converters.adapters.config import NAME
from megabatch.converters.adapters.expert_order import ExpertsTogether
from megabatch.converters.adapters.mcore_folder import EMBEDDING, suffixes
from megabatch.converters.adapters.names import BASE, low_rank_name, whole_name
from megabatch.converters.adapters.open import base_model_of, open_adapters
from megabatch.converters.adapters.pairs import Pair, Rows, joined, tensor_of
from megabatch.converters.adapters.peft_config import described
from megabatch.converters.adapters.peft_experts import Adapted, expert_leaves
from megabatch.converters.adapters.peft_folder import WEIGHTS
from megabatch.converters.adapters.to_mcore import carried, tables_of
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.engine.plan import Numbered, Plan, SmallFile, Strip, TargetFile, Tensor, uncollected
from megabatch.converters.engine.sources import Sources
from megabatch.converters.mapping import ExpertLayout, Mapped, elements
from megabatch.converters.request import Path_
from megabatch.converters.safetensors_io.header import ITEMSIZE, build_header
from megabatch.errors import ConversionError


class _Of(NamedTuple):
    """A pair on its way out."""

    part: Part
    pair: Pair
    scale: float
    direct: Tensor | None
    """B of all experts, where the source has it as it is to be written."""


@uncollected()
def plan_adapter_to_peft(
    adapter: Path_, base: Path_ | None = None, *, peft_format: ExpertLayout | None = None, accept_bin: bool = False
) -> Plan:
    """Plans a PEFT folder. `base`: the Hugging Face folder of its model, whose weights are not read.

    `peft_format`: how experts are written, `per_expert` or `fused`; by default as adapter_config.json has them.
    Raises: ConversionError for anything that does not fit, before anything is written.
    """
    model = base_model_of(adapter) if base is None else Path(base)
    tables, numbered = tables_of(model), Numbered()
    (opened,) = open_adapters([adapter], tables, numbered, accept_bin=accept_bin)
    with Sources(numbered.files) as sources:
        writer = _Writer(opened, sources, _layout(opened, peft_format), asked=peft_format is not None)
        tensors = dict(sorted(writer.tensors().items()))
    head, extents = build_header(
        {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata={"format": "pt"}
    )
    size = len(head) + sum(extent.size for extent in extents.values())
    config, notes = described(opened.config, writer.adapted, tables, asked=peft_format)
    return Plan(
        direction="adapter_to_peft",
        source=opened.path,
        sources=numbered.files,
        files=[TargetFile(WEIGHTS, size, head)],
        tensors=[tensors[name]._replace(name=name, offset=extent.start) for name, extent in extents.items()],
        small=[*carried(opened.config.path.parent, ("config.json",)), SmallFile(NAME, lambda: config)],
        auxiliary=None,
        ignored=opened.aside,
        notes=notes,
    )


def _layout(adapter: Adapter, wanted: ExpertLayout | None) -> ExpertLayout:
    if wanted is not None:
        return wanted
    fused = any(adapter.config.targets_parameter(name) for name in adapter.tables.stacks)
    return "fused" if fused else "per_expert"


class _Writer:
    """Translates one adapter into PEFT's names."""

    def __init__(self, adapter: Adapter, sources: Sources, layout: ExpertLayout, *, asked: bool) -> None:
        """`asked`: whether the layout was asked for, or is the source's."""
        self._adapter, self._sources, self._tables = adapter, sources, adapter.tables
        self._table = adapter.tables.by_target[layout]
        self._layout, self._asked = layout, asked
        self._expert_leaves = expert_leaves(adapter.tables) if adapter.tables.stacks else set()
        self.adapted: list[Adapted] = []
        """Every module and parameter with an adapter."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of adapter_model.safetensors, without a place in a file yet."""
        made: dict[str, Tensor] = {}
        stacks: dict[str, dict[int, _Of]] = {}
        for target, mapped in self._table.items():
            for of in self._pairs(mapped, self._adapter.blocks.get(target, [])):
                name, index = of.part
                if name in self._tables.stacks:
                    stacks.setdefault(name, {})[index or 0] = of
                else:
                    made |= self._module(mapped, of)
        leaves = {name.rpartition(".")[2] for name in stacks}
        for name, experts in stacks.items():
            made |= self._stack(name, experts, leaves)
        modules = {one.key.removesuffix(".weight") for one in self.adapted}
        for name, whole in self._adapter.whole.items():
            rows = whole.strips[-1].row + whole.strips[-1].rows
            size = elements(whole.shape) // rows * ITEMSIZE[whole.dtype]
            tensor = Tensor("", 0, 0, whole.shape, whole.dtype, whole.dtype, rows, size, size, whole.strips)
            made[whole_name(name, wrapped=name.rpartition(".")[0] in modules)] = tensor
        return made

    def _pairs(self, mapped: Mapped, blocks: list[Block]) -> Iterator[_Of]:
        """The adapters of the Hugging Face tensors in a layer."""
        if not blocks:
            return
        for part, own in spans_by_part(mapped).items():
            rows: list[Rows] = []
            for block in blocks:
                for span in block.spans:
                    for place in own:
                        start = max(span.row, place.row)
                        stop = min(span.row + span.rows, place.row + place.rows)
                        if start < stop:
                            self._check_order(mapped, part, span.every, place.every)
                            row, first = place.first + start - place.row, span.first + start - span.row
                            rows.append(Rows(block, row, stop - start, first))
            if rows:
                yield self._pair(mapped, part, rows)

    def _check_order(self, mapped: Mapped, part: Part, *steps: int) -> None:
        if any(step != 1 for step in steps):
            raise ConversionError(
                f"{self._adapter.path}: {part[0]} has its rows in another order than {mapped.name}: not supported"
            )

    def _pair(self, mapped: Mapped, part: Part, rows: list[Rows]) -> _Of:
        what = f"{self._adapter.path}: {part[0]}"
        blocks = list(dict.fromkeys(row.block for row in rows))
        scales = {block.scale for block in blocks}
        if len(scales) > 1:
            raise ConversionError(f"{what}: its parts have the scales {sorted(scales)}, but they must be equal")
        block = blocks[0]
        if suffixes(mapped) == EMBEDDING:
            return _Of(part, Pair(block.rank, tensor_of(block.left), tensor_of(block.right)), block.scale, None)
        shape = self._tables.shapes[part[0]]
        height = shape[-2] if part[0] in self._tables.stacks else shape[0]
        if part[0] in self._tables.stacks and block.left.pick is not None and block.left.pick[2] > 1:
            # the source has all experts together; read once for all
            direct = tensor_of(block.left._replace(pick=None))
            return _Of(part, Pair(block.rank, tensor_of(block.right), direct), block.scale, direct)
        return _Of(part, joined(rows, height, sources=self._sources, what=what), block.scale, None)

    def _module(self, mapped: Mapped, of: _Of) -> dict[str, Tensor]:
        weight = of.part[0]
        module, embedding = weight.removesuffix(".weight"), suffixes(mapped) == EMBEDDING
        parameter = self._is_parameter(mapped, weight, module)
        self.adapted.append(Adapted(weight if parameter else module, of.pair.rank, of.scale, parameter))
        return {
            low_rank_name(module, "A", embedding=embedding): of.pair.a,
            low_rank_name(module, "B", embedding=embedding): of.pair.b,
        }

    def _is_parameter(self, mapped: Mapped, weight: str, module: str) -> bool:
        """Whether adapter_config.json names the layer's parameter in place of the module: as the source's does, but
        for a layout that was asked for.

        transformers 5 has no linear layer for routers, but a module with a parameter; and PEFT would take a module
        that is called as experts' layers are for one of them (`peft_experts`).
        """
        config, fused = self._adapter.config, self._layout == "fused"
        named, router = config.targets_parameter(weight), mapped.name.endswith("mlp.router.weight")
        if not self._asked:
            return named or (fused and router and not config.targets(module))
        if router:
            return fused
        return named or (mapped.expert is None and module.rpartition(".")[2] in self._expert_leaves)

    def _stack(self, name: str, experts: dict[int, _Of], leaves: set[str]) -> dict[str, Tensor]:
        """All experts' adapters of a parameter, as `peft_folder` describes them."""
        count, first = self._tables.stacks[name], next(iter(experts.values()))
        if len({(of.pair.rank, of.scale, of.pair.a.dtype, of.pair.b.dtype) for of in experts.values()}) > 1:
            raise ConversionError(
                f"{self._adapter.path}: {name}: its experts' adapters differ in rank, scale or dtype"
            )
        rank = first.pair.rank
        self.adapted.append(Adapted(name, rank, first.scale, True))
        numbers = sorted(experts)
        a, b = [experts[number].pair.a for number in numbers], [experts[number].pair.b for number in numbers]
        owner = name.rpartition(".")[0]
        own = [other for other in self._tables.stacks if other.rpartition(".")[0] == owner]
        inner = [other for other in own if other.rpartition(".")[2] in leaves]
        module = owner + BASE * (len(inner) - 1 - inner.index(name))
        height = b[0].rows
        lying = first.direct or _below(b, numbers, count)._replace(arrangement=ExpertsTogether(count))
        return {
            low_rank_name(module, "A"): _below(a, numbers, count)._replace(shape=(count * rank, a[0].shape[1])),
            low_rank_name(module, "B"): lying._replace(shape=(height, rank * count)),
        }


def _below(tensors: list[Tensor], numbers: list[int], count: int) -> Tensor:
    """Tensors of equal shape one below the other, at these places among `count`; the others are zero."""
    first = tensors[0]
    strips: list[Strip] = []
    for number, tensor in zip(numbers, tensors, strict=True):
        if tensor.arrangement is not None:
            raise ConversionError("adapters that are cut by columns cannot be stacked: this is a bug in megabatch")
        strips += (strip._replace(row=strip.row + number * first.rows) for strip in tensor.strips)
    return first._replace(rows=count * first.rows, strips=tuple(strips))
