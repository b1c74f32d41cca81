"""Trains compositions of objectives, many in one world of ranks, and says how far each is from fp64."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))

import numpy as np
import torch
import torch.distributed as dist
from adapted import opened
from composed import worlds
from in_fp64 import Found, Text, expected
from objective_runs import EPSILON, LR, Aligned, Kind, make, recipe_of
from rank_server import RankServer
from runs import metrics, write_run
from safetensors.torch import load_file

TOLERANCE = 1e-5
_SMALL = 1e-3
"""Gradients of tensors below this share of the whole gradient are measured against it; metrics against 1."""


def stepped(run_dirs: list[str], cache: str) -> None:
    """A step of every run, on one rank; the model after it goes to the run's `exported/`."""
    for loop, progress, run_dir in _opened(run_dirs, cache):
        with loop.metrics:
            next(loop.steps(progress))
        (folder := run_dir / "exported").mkdir(exist_ok=True)
        loop.parts.export.save(loop.engine.model, loop.engine.ranks, folder)


def drawn(run_dirs: list[str], cache: str) -> list[list[tuple[Any, ...]]]:
    """The texts of the first global batch of every run, which has one process."""
    return [
        [text for pack in next(loop.parts.steps.after(progress.cursor, loop.engine)).packs for text in _texts(pack)]
        for loop, progress, _ in _opened(run_dirs, cache)
    ]


def _opened(run_dirs: list[str], cache: str) -> Iterator[tuple[Any, Any, Path]]:
    warnings.simplefilter("ignore")
    os.environ["MEGABATCH_CACHE"] = cache
    dist.init_process_group("gloo")
    for run_dir in run_dirs:
        with opened(run_dir, trained=False) as (_, loop, progress):
            yield loop, progress, Path(run_dir)
    dist.destroy_process_group()


def _texts(pack: Any) -> Iterator[tuple[Any, ...]]:
    """(ids, whether each but the first is learned, columns, their token columns) as numpy arrays and numbers; whole
    texts, of which a row has shared tokens once."""
    shared, ids = pack.shared, pack.ids_T.numpy()
    bounds = pack.cu_seqlens_padded[: pack.sequences + 1].tolist()
    lengths = pack.cu_seqlens.diff().tolist()
    for number, (start, _) in enumerate(pairwise(bounds)):
        stop = start + lengths[number]
        columns = {name: float(values[number]) for name, values in pack.columns.items()}
        first, count = (0, 0) if shared is None else (int(shared.starts_S[number]), int(shared.counts_S[number]))
        learned = pack.weights_T[start : stop - 1].double().numpy()
        yield (
            np.concatenate([ids[first : first + count], ids[start:stop]]),
            np.concatenate([np.zeros(count), learned]),
            columns,
            {name: values[start : stop - 1].numpy() for name, values in pack.token_columns.items()},
        )


@dataclass(frozen=True)
class Apart:
    """Largest relative differences from fp64."""

    loss: float
    grad_norm: float
    gradient: float
    """Of any tensor."""
    metric: float
    where: str
    """The tensor."""

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad_norm, self.gradient, self.metric)


@dataclass
class Compared:
    """Runs in one folder; each kind is computed in fp64 once."""

    ranks: RankServer
    folder: Path
    timeout_s: float = 500
    """Of one world."""
    expected: dict[Kind, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make(self.folder)

    def deviations(self, chosen: Iterable[Aligned]) -> Iterator[Mapping[str, Apart]]:
        """By name, for each world in turn. Raises: RuntimeError where a rank fails or hangs."""
        for world in worlds(chosen):
            self._compute({one.kind for one in world} - self.expected.keys())
            self._on_ranks(stepped, {one.name: one for one in world})
            yield {one.name: self._deviation(one) for one in world}

    def _compute(self, kinds: set[Kind]) -> None:
        if kinds:
            (found,) = self._on_ranks(drawn, {f"{kind}, drawn": kind.alone for kind in kinds})
            for kind, texts in zip(kinds, found, strict=True):
                self.expected[kind] = expected(kind, self.folder, [_text(*one) for one in texts])

    def _on_ranks(self, function: Callable[..., Any], runs: Mapping[str, Aligned]) -> list[Any]:
        """Args: runs: of one world, by the name of the folder of each."""
        return self.ranks.run(
            function,
            world_size=next(iter(runs.values())).world_size,
            timeout_s=self.timeout_s,
            run_dirs=[str(write_run(recipe_of(one, self.folder), self.folder / name)) for name, one in runs.items()],
            cache=str(self.folder / "cache"),
        )

    def _deviation(self, one: Aligned) -> Apart:
        expected, run = self.expected[one.kind], self.folder / one.name
        logged = metrics(run)[-1]
        found = _gradient(one.kind.start(self.folder), run / "exported")
        assert found.keys() == expected.gradient.keys(), found.keys() ^ expected.gradient.keys()
        whole = expected.grad_norm
        parts = {
            name: float((found[name] - other).norm()) / max(float(other.norm()), _SMALL * whole)
            for name, other in expected.gradient.items()
        }
        named = [abs(logged[name] - value) / max(abs(value), 1.0) for name, value in expected.metrics.items()]
        where = max(parts, key=lambda name: parts[name])
        return Apart(
            loss=abs(logged["loss"] / expected.metrics["loss"] - 1),
            grad_norm=abs(logged["grad_norm"] / whole - 1),
            gradient=parts[where],
            metric=max(named),
            where=where,
        )


def _text(ids: np.ndarray, learned: np.ndarray, columns: dict[str, float], of_tokens: dict[str, np.ndarray]) -> Text:
    values = {name: torch.from_numpy(value) for name, value in of_tokens.items()}
    return Text(torch.from_numpy(ids).long(), torch.from_numpy(learned), columns, values)


def _gradient(before: Path, after: Path) -> dict[str, torch.Tensor]:
    """What Adam's first step divided by: from the change of each tensor."""
    old, new = _tensors(before), _tensors(after)
    assert old.keys() == new.keys(), old.keys() ^ new.keys()
    changes = {name: old[name] - new[name] for name in old}
    return {name: change * EPSILON / (LR - change.abs()) for name, change in changes.items()}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.double() for file in files for name, tensor in file.items()}
