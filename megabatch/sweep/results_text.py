"""What a sweep came to, as tables and as JSON: each run, and the means over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabatch.slurm.queue import State
from megabatch.sweep.names import in_order, labels, number_text
from megabatch.sweep.results import SHOWN, Result, lowest_first, ranked
from megabatch.sweep.seeds import CONFIDENCE, SEED, means
from megabatch.table import text_width


def results_text(results: Sequence[Result], *, by: str) -> str:
    """The table of runs and, where seeds are swept, that of their means. Raises: LaunchError for an unknown metric."""
    swept = in_order({name for result in results for name in result.values})
    return "\n\n".join(filter(None, [_runs_table(results, swept, by=by), _means_table(results, swept, by=by)]))


def _runs_table(results: Sequence[Result], swept: Sequence[str], *, by: str) -> str:
    """One line per point, with the ranking column first."""
    label = labels(swept)
    shown = [by, *(name for name in SHOWN if name != by and any(name in result.metrics for result in results))]
    header = ["run", *(label[name] for name in swept), *map(_title, shown), "step", "state"]
    rows = [
        [
            result.name,
            *(_value(result.values.get(name)) for name in swept),
            *(_figure(result.metrics.get(name)) for name in shown),
            "-" if result.step is None else str(result.step),
            f"{result.state}{f': {result.why}' if result.why else ''}",
        ]
        for result in ranked(results, by=by)
    ]
    return _aligned([header, *rows])


def _means_table(results: Sequence[Result], swept: Sequence[str], *, by: str) -> str:
    """One line per point but for its seed, the best first; nothing where there are no two seeds."""
    finished = [result for result in results if result.state == State.COMPLETED and by in result.metrics]
    if len({result.values.get(SEED) for result in results}) < 2 or not finished:
        return ""
    others = [name for name in swept if name != SEED]
    label = labels(others)
    found = means([(result.values, result.metrics[by]) for result in finished])
    found.sort(key=lambda one: one.mean if lowest_first(results, by) else -one.mean)
    rows = [
        [
            str(one.runs),
            *(_value(one.values.get(name)) for name in others),
            _figure(one.mean),
            "-" if one.half_width is None else f"± {_figure(one.half_width)}",
        ]
        for one in found
    ]
    title = f"mean over the seeds of finished runs, and its {CONFIDENCE:.0%} confidence interval:"
    return "\n".join([title, _aligned([["runs", *(label[name] for name in others), _title(by), ""], *rows])])


def _title(metric: str) -> str:
    return metric.replace("_per_", "/")


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns with the first cell left and the others right; the last one stays as it is."""
    widths = [max(text_width(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(_line(line, widths).rstrip() for line in lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    spaces = [" " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=False)]
    middle = [space + cell for space, cell in zip(spaces[1:], row[1:], strict=False)]
    return "  ".join([row[0] + spaces[0], *middle, row[-1]])


def _value(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    text = "-" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_json(results: Sequence[Result], *, by: str) -> str:
    """One array, ranked. Raises: LaunchError for an unknown metric."""
    return json.dumps(
        [{name: _plain(getattr(result, name)) for name in Result.__slots__} for result in ranked(results, by=by)],
        indent=2,
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
