"""Compares every composition of parallel sizes, rows and tuning on up to eight ranks with one process.

python tests/matrix.py RESULTS.jsonl              hours on a few cores; goes on where it was interrupted
python tests/matrix.py RESULTS.jsonl --table      what is there, as a table
python tests/matrix.py RESULTS.jsonl --scores     classifiers, embeddings and rerankers instead: minutes
python tests/matrix.py RESULTS.jsonl --objectives preferences, reward models and distillation in fp64 instead: an hour
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "trainer"))
sys.path.insert(0, str(Path(__file__).parent / "trainer" / "aligned"))
sys.path.insert(0, str(Path(__file__).parent / "trainer" / "heads"))
sys.path.insert(0, str(Path(__file__).parent / "trainer" / "lora"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, installed or not

import objective_runs
import scored
from composed import TOLERANCE, Composed
from compositions import Composition, compositions, covering
from objectives_compared import Compared
from rank_server import RankServer

FEW = 4
TIMEOUT_S = 1800
"""Of one composition, on a machine that has other work. Each has ranks of its own: those of a second one would keep
the threads of the first one's process groups."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON Lines, a line for each composition")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--scores", action="store_true", help="tasks that score texts, at a few compositions each")
    parser.add_argument("--objectives", action="store_true", help="preferences, reward models and distillation")
    options = parser.parse_args(arguments)
    if options.scores:
        return _scores(options.results)
    every: Sequence[Composition] = objective_runs.every() if options.objectives else compositions()
    if not options.table and options.objectives:
        # what covers every pair, then every three
        _run(options.results, [covering(every), covering(every, together=3), every], Compared)
    elif not options.table:
        few = [one for one in every if one.world_size <= FEW]
        _run(options.results, [covering(every), few, _one_of_each_layout(), every], Composed)
    found = _read(options.results)
    print(_table(found, every, objectives=options.objectives))
    return int(any(not _passes(one) for one in found.values()) or len(found) < len(every))


def _run(results: Path, parts: Sequence[Sequence[Composition]], compared: Callable[..., Composed | Compared]) -> None:
    """The compositions of each part in turn, but those that are done."""
    done, ranks = set(_read(results)), RankServer()
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder, open(results, "a", encoding="utf-8") as file:
        composed = compared(ranks, Path(folder), timeout_s=TIMEOUT_S)
        for one in chain.from_iterable(parts):
            if one.name not in done:
                print(json.dumps(_line(composed, one)), file=file, flush=True)
                done.add(one.name)
    ranks.close()


def _scores(results: Path) -> int:
    """Every task of `scored`, from the start."""
    ranks, failed = RankServer(), 0
    with open(results, "w", encoding="utf-8") as file:
        for task in scored.TASKS:
            with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
                scored.write_rows(task, Path(folder))
                composed = Composed(ranks, Path(folder), timeout_s=TIMEOUT_S, recipe_of=scored.recipe_of(task))
                found = [_line(composed, one) for one in scored.COMPOSITIONS]
            for line in found:
                text = json.dumps({**line, "name": f"{task}-{line['name']}"})
                print(text, file=file, flush=True)
                print(text, flush=True)
                failed += not _passes(line)
    ranks.close()
    return int(failed > 0)


def _one_of_each_layout() -> list[Composition]:
    """Kinds of rows and tuning in turn."""
    layouts = defaultdict(list)
    for one in compositions():
        layouts[replace(one, packed=False, lora=False)].append(one)
    return [kinds[number % len(kinds)] for number, kinds in enumerate(layouts.values())]


def _line(composed: Composed | Compared, one: Any) -> dict[str, Any]:
    about = {"name": one.name, "ranks": one.world_size}
    try:
        [found] = composed.deviations([one])
    except RuntimeError as error:
        return {**about, "error": str(error)[-4000:]}
    return {**about, **asdict(found[one.name])}


def _read(results: Path) -> dict[str, dict[str, Any]]:
    """By name; the last line of each."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def _passes(line: dict[str, Any]) -> bool:
    return "error" not in line and max(value for value in line.values() if isinstance(value, float)) <= TOLERANCE


def _table(found: dict[str, dict[str, Any]], every: Sequence[Composition], *, objectives: bool) -> str:
    """How many of each kind, and the largest deviations."""
    kinds, expected = defaultdict(list), defaultdict(int)
    names = ["loss", "grad_norm", *(["gradient", "metric"] if objectives else [])]
    for one in every:
        kind = "-".join(one.name.split("-")[: 4 if objectives else 3])
        expected[kind] += 1
        if one.name in found:
            kinds[kind].append(found[one.name])
    titles = ["kind", "compositions", "done", *(f"largest {name}" for name in names), "where", "failed"]
    rows = [f"| {' | '.join(titles)} |", f"| {' | '.join('-' for _ in titles)} |"]
    for kind, count in expected.items():
        numbers = [line for line in kinds[kind] if "error" not in line]
        worst = max(numbers, key=lambda line: max(line[name] for name in names), default=None)
        largest = [f"{max((line[name] for line in numbers), default=0):.1e}" for name in names]
        failed = [line["name"] for line in kinds[kind] if not _passes(line)]
        where = worst["name"].removeprefix(f"{kind}-") if worst else ""
        cells = [kind, str(count), str(len(kinds[kind])), *largest, where, ", ".join(failed) or "none"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
