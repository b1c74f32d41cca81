"""Trains compositions, many in one world of ranks, and says how far each is from one process."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from compositions import Composition, recipe_of
from rank_server import RankServer
from runs import recipe, write_run

from megabatch import Recipe

sys.path.insert(0, str(Path(__file__).parent / "lora"))

from adapted import opened

STEPS = 2
"""The second step's loss and gradient also show the update of the first."""
TOLERANCE = 1e-5
"""Relative, in fp32."""

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def curves(run_dirs: list[str], cache: str) -> list[Curve]:
    """Of every run, on one rank. Args: cache: a folder of tokens for all of them."""
    warnings.simplefilter("ignore")
    os.environ["MEGABATCH_CACHE"] = cache
    dist.init_process_group("gloo")
    found = [_curve(run_dir) for run_dir in run_dirs]
    dist.destroy_process_group()
    return found


def _curve(run_dir: str) -> Curve:
    found = []
    with opened(run_dir) as (_, loop, progress):
        steps = loop.parts.steps.after(progress.cursor, loop.engine)
        for _ in range(STEPS):
            step = next(steps)
            result = loop.engine.step(step.packs, loop.parts.objective, totals=step.totals, filled=step.filled)
            found.append((result.metrics["loss"].value, result.grad_norm))
    return found


@dataclass(frozen=True)
class Deviation:
    """Largest relative difference from one process, over steps and ranks."""

    loss: float
    grad_norm: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad_norm)


@dataclass
class Composed:
    """Runs in one folder; each reference is computed once."""

    ranks: RankServer
    folder: Path
    timeout_s: float = 500
    """Of one world."""
    recipe_of: Callable[[Composition, Path], Recipe] = recipe_of
    references: dict[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe(self.folder)  # makes the data

    def deviations(self, chosen: Iterable[Composition]) -> Iterator[Mapping[str, Deviation]]:
        """By name, for each world in turn: the compositions of one size.
        Raises: RuntimeError where a rank fails or hangs."""
        for world in worlds(chosen):
            self._refer(world)
            found = self._curves(world)
            yield {one.name: _deviation(found[one.name], self.references[one.reference]) for one in world}

    def _refer(self, world: list[Composition]) -> None:
        wanted = {one.reference: one.alone for one in world if one.reference not in self.references}
        if wanted:
            found = self._curves(list(wanted.values()))
            self.references |= {name: found[one.name][0] for name, one in wanted.items()}

    def _curves(self, world: list[Composition]) -> dict[str, list[Curve]]:
        """Of each rank."""
        runs = [str(write_run(self.recipe_of(one, self.folder), self.folder / one.name)) for one in world]
        found = self.ranks.run(
            curves,
            world_size=world[0].world_size,
            timeout_s=self.timeout_s,
            run_dirs=runs,
            cache=str(self.folder / "cache"),
        )
        return {one.name: list(of_ranks) for one, of_ranks in zip(world, zip(*found, strict=True), strict=True)}


def worlds(chosen: Iterable[Composition]) -> Iterable[list[Composition]]:
    """In parts of one number of ranks."""
    sizes = defaultdict(list)
    for one in chosen:
        sizes[one.world_size].append(one)
    return sizes.values()


def _deviation(found: list[Curve], expected: Curve) -> Deviation:
    """Of several ranks' curves."""
    differences = [
        [abs(a - b) / abs(b) for a, b in zip(step, reference, strict=True)]
        for curve in found
        for step, reference in zip(curve, expected, strict=True)
    ]
    return Deviation(*map(max, zip(*differences, strict=True)))
