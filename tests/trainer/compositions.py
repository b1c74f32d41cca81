"""Every composition of parallel sizes, rows and tuning that a small model can be trained with on up to eight ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from runs import recipe_on, with_fields

from megabatch import Recipe
from megabatch.config.new_model import declared_shape
from megabatch.config.rules.check import check
from megabatch.plan.layout import Layout, layout
from megabatch.plan.shape import ModelShape

MOST_RANKS = 8
GLOBAL_BATCH_SIZE = 8
WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,  # eight tensor-parallel ranks share each by two
    "kv_channels": 8,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_ffn_hidden_size": 16, "moe_router_topk": 2}
PACKED: dict[str, Any] = {"packing": True, "packing_length": 96}
LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}


@dataclass(frozen=True, kw_only=True, order=True)
class Composition:
    """One way to train; the sizes are those of `plan.Layout`."""

    experts: bool
    packed: bool
    lora: bool
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    layers: int = 0
    """If not as many as there are chunks."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_layers(self) -> int:
        """At least two, and one for each chunk."""
        return self.layers or max(2, self.pp * self.vp)

    @property
    def micro_batch_size(self) -> int:
        """As large as lets micro-batches add up, and fill the pipeline: all of them take most of the time."""
        rows = GLOBAL_BATCH_SIZE // self.dp
        return max(1, rows // 2 ** (max(2, self.pp) - 1).bit_length())

    @property
    def name(self) -> str:
        sizes = [f"{name}{size}" for name, size in asdict(self).items() if type(size) is int and size > 1]
        return "-".join([*self._kind, *sizes, *(["sp"] if self.sp else [])])

    @property
    def alone(self) -> Composition:
        """One process that computes the same."""
        same = {name: getattr(self, name) for name in ("experts", "packed", "lora")}
        return Composition(**same, layers=self.num_layers)

    @property
    def reference(self) -> str:
        return self.alone.name

    @property
    def _kind(self) -> list[str]:
        kinds = ("experts" if self.experts else "dense", "packed" if self.packed else "rows")
        return [*kinds, "lora" if self.lora else "full"]


def layout_of(one: Composition) -> Layout | None:
    sizes = {name: getattr(one, name) for name in ("tp", "pp", "cp", "vp", "ep", "etp", "micro_batch_size")}
    return layout(world_size=one.world_size, global_batch_size=GLOBAL_BATCH_SIZE, **sizes)


def recipe_of(one: Composition, folder: Path) -> Recipe:
    """A run of it on the data that `runs.recipe` made in `folder`."""
    return laid_out(_of_its_kind(one.alone, folder), one)


def laid_out(made: Recipe, one: Composition) -> Recipe:
    """A recipe of one process at the sizes of a composition."""
    return with_fields(
        made,
        batch={"micro_batch_size": one.micro_batch_size},
        parallel={
            "tensor_model_parallel_size": one.tp,
            "sequence_parallel": one.sp,
            "pipeline_model_parallel_size": one.pp,
            "num_virtual_stages_per_pipeline_rank": one.vp if one.vp > 1 else None,
            "context_parallel_size": one.cp,
            "expert_model_parallel_size": one.ep,
            "expert_tensor_parallel_size": one.etp,
        },
        resources={"tasks_per_node": one.world_size},
    )


@cache
def _of_its_kind(alone: Composition, folder: Path) -> Recipe:
    targets = ["all-linear", "all-embedding", "output_layer", *(["all-router"] if alone.experts else [])]
    made = recipe_on(
        folder,
        "qwen3_moe" if alone.experts else "qwen3",
        moe=EXPERTS if alone.experts else {},
        tuner={**LORA, "target_modules": targets} if alone.lora else {},
        bridge={"merge_lora": False} if alone.lora else {},
        data=PACKED if alone.packed else {},
        batch={"global_batch_size": GLOBAL_BATCH_SIZE},
        evaluation={"eval_on_start": False},
    )
    return with_fields(made, model={**WIDTHS, "num_layers": alone.num_layers})


@cache
def compositions() -> tuple[Composition, ...]:
    """All that the rules allow, in order of size. Raises: nothing; a refused composition is left out."""
    return tuple(sorted(filter(_is_allowed, _candidates()), key=lambda one: (one.world_size, one)))


def _candidates() -> Iterator[Composition]:
    """Whatever divides the ranks and the batch; experts' sizes where there are experts."""
    sizes = range(1, MOST_RANKS + 1)
    for tp, pp, cp, dp in product(sizes, repeat=4):
        if tp * pp * cp * dp > MOST_RANKS:
            continue
        for experts, packed, lora, sp, vp in product(*[(False, True)] * 3, {False, tp > 1}, (1, 2, 4)):
            for ep, etp in product(sizes, sizes) if experts else [(1, 1)]:
                one = Composition(
                    experts=experts, packed=packed, lora=lora, tp=tp, sp=sp, pp=pp, vp=vp, cp=cp, dp=dp, ep=ep, etp=etp
                )
                if pp * vp <= MOST_RANKS and layout_of(one) is not None:
                    yield one


def _is_allowed(one: Composition) -> bool:
    kind = _of_its_kind(one.alone, Path("data"))
    made = recipe_of(one, Path("data"))
    return not check(made, _shape(one.alone), variant_of=kind, values_are_valid=True)


@cache
def _shape(alone: Composition) -> ModelShape | None:
    return declared_shape(_of_its_kind(alone, Path("data")))


Facts = frozenset[tuple[str, object]]


def covering(every: Sequence[Composition], *, together: int = 2) -> list[Composition]:
    """A few that have every property which any has, with every other that any has beside it: greedily, those with the
    most new ones for each rank first; the first of equals. Args: together: how many properties; 1 for each alone."""
    facts: dict[Composition, set[Facts]] = {
        one: {frozenset(some) for some in combinations(asdict(one).items(), together)} for one in every
    }
    left, chosen = set().union(*facts.values()), []
    while left:
        best = max(every, key=lambda one: (len(facts[one] & left) / (2 + one.world_size), -one.world_size))
        chosen.append(best)
        left -= facts[best]
    return chosen
