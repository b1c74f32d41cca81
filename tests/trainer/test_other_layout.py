"""A model that is split otherwise than the trained one gives the same numbers, for packs of the ranks of that one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_server import RankServer
from runs import recipe, write_run
from test_infer import Everything

from megabatch.config.run import RunConfig
from megabatch.config.second_layouts import REFERENCE
from megabatch.data.tokens.sample import Sample
from megabatch.trainer.other_layout import deal
from megabatch.trainer.pack import collate

SIZES = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
OWN: dict[str, tuple[dict[str, Any], list[tuple[int, int, int, int, int]]]] = {
    "dp4": ({}, [(4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (2, 1, 1, 4, 1), (1, 1, 2, 2, 2)]),
    "pp2_cp2": ({"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1)]),
}
"""The trained model's layout, and tp, pp, cp, ep, etp of others."""


def packs_of(replica: int, count: int) -> list[Any]:
    """Two or three sequences in each, padded for every layout."""
    draw = random.Random(replica)
    found = []
    for _ in range(count):
        lengths = [draw.randint(2, 20) for _ in range(draw.randint(2, 3))]
        ids = [np.array([draw.randrange(3, 300) for _ in range(length)], np.int32) for length in lengths]
        samples = [Sample(one, np.ones(len(one), np.float32), {"text": str(len(one))}) for one in ids]
        found.append(collate(samples, row_multiple=32, sequence_multiple=8))
    return found


def differences(run_dir: str, layouts: list[tuple[int, ...]]) -> tuple[list[float], list[int], float]:
    """How far each layout's numbers are from those at the run's own layout at most; the elements of each model on this
    rank, the run's own last; and the largest number."""
    from megabatch.trainer import assemble
    from megabatch.trainer.engine import Engine
    from megabatch.trainer.model_source import model_source

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        policy = assemble.frozen_model(run, ranks, source)
        others = {}
        for sizes in layouts:
            given = {f"ref_{name}_parallel_size": size for name, size in zip(SIZES, sizes, strict=True)}
            rlhf = replace(run.recipe.rlhf, **given)
            itself = replace(run, recipe=replace(run.recipe, rlhf=rlhf))
            own, its_ranks = assemble.layout_beside(itself, ranks, REFERENCE)
            others[str(sizes)] = assemble.frozen_model(own, its_ranks, source)
        engine = Engine(policy, ranks, frozen=others)
        packs = packs_of(ranks.dp_rank, 3)
        expected = engine.infer(packs, Everything())
        largest = max(float(one["sum"].abs().max()) for one in expected)
        found = []
        for name in others:
            read = engine.infer(packs, Everything(), model=name)
            for pack, one, other in zip(packs, read, expected, strict=True):
                assert (one["targets"] == other["targets"]).all() and len(one["sum"]) == pack.sequences
            apart = [float((one[name] - other[name]).abs().max()) for one, other in zip(read, expected, strict=True)
                     for name in ("logps", "sum")]  # fmt: skip
            found.append(max(apart))
        assert engine.infer(packs, Everything())[0]["logps"].equal(expected[0]["logps"]), "the run's groups are back"
        elements = [
            sum(p.numel() for chunk in one.chunks for p in chunk.parameters()) for one in (*others.values(), policy)
        ]
        return found, elements, largest


@pytest.mark.parametrize("own", OWN)
def test_another_layout_changes_no_number(own: str, ranks: RankServer, tmp_path: Path) -> None:
    parallel, layouts = OWN[own]
    run = write_run(
        recipe(tmp_path, "qwen3_moe", parallel=parallel, resources={"tasks_per_node": 4}), tmp_path / "run"
    )
    everyones = ranks.run(differences, world_size=4, run_dir=str(run), layouts=layouts)
    for found, _, largest in everyones:
        assert max(found) <= 1e-6 * largest, dict(zip(layouts, found, strict=True))
    whole = everyones[0][1][-1]
    for number, (tp, pp, _, ep, etp) in enumerate(layouts):
        if own == "dp4":
            is_split = all(some[number] < whole for _, some, _ in everyones)
            assert is_split == (tp * pp * ep * etp > 1), "each rank has a part of the model alone"


def test_packs_are_dealt_in_order() -> None:
    assert deal([2, 1], 1) == [[(0, 0), (0, 1), (1, 0)]]
    assert deal([1, 1, 1, 1], 2) == [[(0, 0), (1, 0)], [(2, 0), (3, 0)]]
    assert deal([3], 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 2)]]
    assert deal([1], 4) == [[(0, 0)]] * 4
