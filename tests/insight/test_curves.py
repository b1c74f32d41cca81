"""Histories and the numbers behind a chart."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.insight.chart import Series, line_chart, number, ticks
from megabatch.insight.curves import curve, final_history, thinned
from megabatch.insight.tail import last_step

from .made_run import MadeRun


def test_lost_steps_are_not_in_the_final_history(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    run.steps([(step, 1.0 * step) for step in range(1, 9)], attempt=0)
    with open(run.files.metrics, "a") as file:
        file.write('{"kind": "eval", "step": 4, "eval_loss": 2.5}\nnot json\n{"kind": "train"}\n')
    run.steps([(step, 2.0 * step) for step in range(5, 7)], attempt=1)
    train, evaluations = final_history(run.files.metrics)
    assert [(line["step"], line["attempt"]) for line in train] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)]
    assert curve(evaluations, "eval_loss") == [(4.0, 2.5)]
    assert train[-1] == last_step(run.files.metrics)


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thinned(points, 400)
    assert len(kept) <= 400 and kept[0] == points[0] and kept[-1] == points[-1] and (54_321.0, 99.0) in kept
    assert kept == sorted(kept) and thinned(points[:10]) == points[:10]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1, 30, [0, 10, 20, 30]), (2.4, 2.4, [1, 1.5, 2, 2.5, 3, 3.5, 4]), (0, 0, None)],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) >= 3
    assert expected is None or found == pytest.approx(expected)


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0.0, 0.1 + 0.2, 1e-4, 123456.0, 2000.0)] == ["0", "0.3", "0.0001", "1.23e5", "2000"]


def test_a_chart_says_in_words_what_it_shows() -> None:
    svg = line_chart([Series("a <b>", 0, [(1.0, 4.0), (2.0, 1.0), (3.0, 2.0)])], title="Loss")
    assert "a &lt;b&gt;: from 4 at step 1 to 2 at step 3, lowest 1, highest 4" in svg
    assert line_chart([Series("a", 0, [])], title="Loss") == ""
