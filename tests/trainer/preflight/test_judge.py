"""Verdicts over nodes, by hand."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from megabatch.trainer.preflight.judge import CPU_BOUNDS, GPU_BOUNDS, bad_nodes, verdict
from megabatch.trainer.preflight.speed import ROUNDS, rounds


def report(name: str, *speeds: float, clock_s: float = 0.0, **words: Any) -> dict[str, Any]:
    matmul = [{"name": "H100", "tflops": speed} for speed in speeds]
    return {"node": name, "faults": [], "matmul": matmul, "clock_s": clock_s} | words


def link(a: int, b: int, speed: float | str) -> dict[str, Any]:
    said = {"error": speed} if isinstance(speed, str) else {"gb_per_s": speed}
    return {"pair": [a, b], "device": 0, **said}


def judged(
    reports: dict[int, dict[str, Any]], *links: dict[str, Any], count: int | None = None
) -> dict[int, list[str]]:
    found = bad_nodes(reports, links, count=count or len(reports), bounds=GPU_BOUNDS)
    return {index: [bad.check for bad in faults] for index, faults in found.items()}


def test_like_peers_are_good_however_slow() -> None:
    assert judged({0: report("a", 10, 10.5), 1: report("b", 9, 11)}, link(0, 1, 0.001)) == {}


def test_the_slow_gpu_is_named_with_its_place_and_its_peers() -> None:
    reports = {0: report("a", 700, 700), 1: report("b", 700, 540), 2: report("c", 690, 710)}
    found = bad_nodes(reports, [], count=3, bounds=GPU_BOUNDS)
    assert list(found) == [1]
    [bad] = found[1]
    assert (bad.value, bad.rule) == ("H100 1: 540 TFLOP/s", "at least 0.8 of its peers' 700")


def test_other_products_are_no_peers() -> None:
    slower = {"matmul": [{"name": "A100", "tflops": 250.0}]}
    assert judged({0: report("a", 700), 1: report("b", 700), 2: report("c", **slower)}) == {}


def test_a_wrong_product_and_a_missing_answer_are_bad() -> None:
    wrong = {"matmul": [{"name": "H100", "error": "a matrix product is wrong"}]}
    assert judged({0: report("a", 700), 2: report("c", **wrong)}, count=3) == {1: ["answer"], 2: ["matmul"]}


@pytest.mark.parametrize("ahead", [-6.0, 6.0])
def test_clocks(ahead: float) -> None:
    assert judged({0: report("a"), 1: report("b", clock_s=ahead), 2: report("c", clock_s=4.0)}) == {1: ["clock"]}


def test_a_node_whose_every_link_is_slow_is_named_and_its_peers_are_not() -> None:
    reports = {index: report(str(index)) for index in range(4)}
    links = [link(a, b, 10.0 if 2 in (a, b) else 40.0) for a, b in combinations(range(4), 2)]
    assert judged(reports, *links) == {2: ["link"]}
    assert bad_nodes(reports, links, count=4, bounds=CPU_BOUNDS) == {}


def test_one_broken_cable_costs_one_node() -> None:
    reports = {index: report(str(index)) for index in range(4)}
    links = [link(a, b, "TimeoutError" if (a, b) == (0, 3) else 40.0) for a, b in combinations(range(4), 2)]
    assert judged(reports, *links) == {3: ["link"]}


def test_two_bad_nodes_are_both_named() -> None:
    reports = {index: report(str(index)) for index in range(6)}
    links = [link(a, b, 1.0 if {a, b} & {1, 4} else 40.0) for a, b in combinations(range(6), 2)]
    assert judged(reports, *links) == {1: ["link"], 4: ["link"]}


@pytest.mark.parametrize("count", range(2, 12))
def test_rounds_never_use_a_node_twice_and_never_repeat_a_pair(count: int) -> None:
    members = list(range(10, 10 + count))
    found = rounds(members)
    pairs = [pair for round_ in found for pair in round_]
    assert len(found) == min(ROUNDS, count - 1 + count % 2)
    assert all(len({node for pair in round_ for node in pair}) == 2 * len(round_) for round_ in found)
    assert all(len(round_) == count // 2 for round_ in found)
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("bad", "count", "before", "word"),
    [(0, 4, 0, "ok"), (1, 4, 0, "exclude"), (1, 2, 0, "exclude"), (2, 2, 0, "fail"), (1, 1, 0, "exclude"),
     (3, 4, 0, "fail"), (2, 8, 0, "exclude"), (2, 8, 1, "fail"), (3, 64, 0, "fail")],
)  # fmt: skip
def test_few_bad_nodes_are_left_out(bad: int, count: int, before: int, word: str) -> None:
    assert verdict(bad, count=count, excluded_before=before, max_bad_nodes=2).word == word
