"""The import contract: who may import whom (import-linter), no circles, and what importing a room does not pull in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "megatron", "transformers", "numpy", "datasets", "submitit", "safetensors", "tokenizers")
COMPUTING = (
    "cache", "tokens", "rows.sources", "rows.mixing", "schedule", "stream", "packing", "run_caches", "run_tokenizer",
    "prepare", "reference_log_probs", "whole_data",
)  # fmt: skip
"""Of megabatch.data; they import numpy."""
TENSORS = ("advantages", "corrections", "entropy", "rounds", "sequences", "surrogates")
"""Of megabatch.rl; they import torch or numpy."""
OF_VLLM = (
    "adapter", "colocated", "group", "kept_apart", "loading", "pool", "scoring", "server", "serving", "stream",
    "tempering", "worker",
)  # fmt: skip
"""Of megabatch.rollout.vllm; they import torch or numpy, or what does."""
WITH_TORCH = (
    "megabatch.trainer",
    "megabatch.rollout.local",
    *(f"megabatch.rollout.vllm.{one}" for one in OF_VLLM),
    *(f"megabatch.rl.{one}" for one in TENSORS),
)
"""Folders and files that no launcher imports."""


def test_rooms_import_only_what_they_may() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("megabatch", cache_dir=None)


def test_the_contract_sees_the_linked_rooms(graph: grimp.ImportGraph) -> None:
    """A contract about modules that the linter does not find would hold for ever."""
    assert {"megabatch.slurm.render", "megabatch.converters.family", "megabatch.trainer.loop"} <= graph.modules


def test_an_import_inside_a_function_is_an_arrow(graph: grimp.ImportGraph) -> None:
    assert graph.direct_import_exists(importer="megabatch.cli.command", imported="megabatch.cli.status")


def test_no_circle_of_files(graph: grimp.ImportGraph) -> None:
    arrows = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert not (found := list(_circles(arrows))), _described(found)


def test_no_circle_of_folders(graph: grimp.ImportGraph) -> None:
    """In each folder, whose files and folders are the nodes: what they hold imports one way."""
    found = [circle for folder in sorted(graph.modules) for circle in _circles(_arrows_in(graph, folder))]
    assert not found, _described(found)


def test_every_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d", "f"}, "f": set()}
    assert list(_circles(arrows)) == [("a", "b", "c"), ("d", "e")]
    assert _described([("a", "b", "c")]) == "a -> b -> c -> a"


def _circles(arrows: Mapping[str, Set[str]]) -> Iterator[tuple[str, ...]]:
    """A shortest circle through each node that lies on one, each circle once."""
    seen: set[frozenset[str]] = set()
    for node in sorted(arrows):
        circle = _way_back(arrows, node)
        if circle and frozenset(circle) not in seen:
            seen.add(frozenset(circle))
            yield circle


def _way_back(arrows: Mapping[str, Set[str]], node: str) -> tuple[str, ...]:
    """The nodes of a shortest way from a node to itself; empty where there is none."""
    ways, reached = [(node,)], {node}
    for way in ways:
        for following in sorted(arrows[way[-1]]):
            if following == node:
                return way
            if following not in reached:
                reached.add(following)
                ways.append((*way, following))
    return ()


def _arrows_in(graph: grimp.ImportGraph, folder: str) -> dict[str, set[str]]:
    """Who of a folder's children imports whom, all that lies in a child counted as the child."""
    children = sorted(graph.find_children(folder))
    child_of = {name: child for child in children for name in (child, *graph.find_descendants(child))}
    arrows: dict[str, set[str]] = {child: set() for child in children}
    for name, child in child_of.items():
        imported = (child_of.get(other, child) for other in graph.find_modules_directly_imported_by(name))
        arrows[child] |= {other for other in imported if other != child}
    return arrows


def _described(circles: list[tuple[str, ...]]) -> str:
    return "\n".join(" -> ".join((*circle, circle[0])) for circle in circles)


def _light_modules() -> list[str]:
    """Every module that a launcher may import: none with torch, and of data those that need no numpy."""
    package = ROOT / "megabatch"
    found = [*package.rglob("*.py"), *(package / "slurm").rglob("*.py"), *(package / "converters").rglob("*.py")]
    names = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in found}
    computing = (*WITH_TORCH, *(f"megabatch.data.{one}" for one in COMPUTING))
    light = {name for name in names if not name.startswith(computing)}
    always = ("tokens.tokenizer", "tokens.default_templates", "tokens.new_tokens")
    return sorted(light | {f"megabatch.data.{one}" for one in always})


def _imported(statement: str) -> set[str]:
    """Heavy packages in `sys.modules` of a fresh process after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_a_launcher_imports_is_light() -> None:
    """All modules in one process first; module by module only to name the culprit."""
    modules = [name for name in _light_modules() if not name.endswith("__main__")]
    assert len(modules) > 50
    allowed = {"megabatch.slurm.submit": {"submitit", "numpy"}}
    rest = [name for name in modules if name not in allowed]
    found = _imported("\n".join(f"import {name}" for name in rest))
    if found:
        culprits = {name: heavy for name in rest if (heavy := _imported(f"import {name}"))}
        pytest.fail(f"imported at module level: {culprits}")


def test_a_launch_imports_rewards_and_servers_only_where_a_recipe_has_them() -> None:
    code = (
        "import sys, megabatch.entry.command\n"
        "print([m for m in ('asyncio', 'http.client', 'megabatch.rewards.named') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_data_needs_no_torch() -> None:
    paths = sorted((ROOT / "megabatch" / "data").rglob("*.py"))
    modules = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in paths]
    assert len(modules) > 25
    found = _imported("\n".join(f"import {name.removesuffix('.__init__')}" for name in modules))
    assert found <= {"numpy"}


@pytest.mark.parametrize(
    "recipe", sorted(str(p.relative_to(ROOT / "recipes")) for p in (ROOT / "recipes").rglob("*.py"))
)
def test_recipes_import_nothing_heavy(recipe: str) -> None:
    assert _imported(f"import runpy; runpy.run_path('recipes/{recipe}')") == set()


def test_names_of_recipes_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, megabatch, megabatch.converters.command.main\n"
        "assert 'megabatch.config' not in sys.modules\n"
        "assert all(getattr(megabatch, name) for name in megabatch.__all__)\n"
        "from megabatch import *\n"
        "assert Recipe.__module__ == 'megabatch.config.recipe'\n"
        "assert set(megabatch.__all__) <= set(dir(megabatch))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
