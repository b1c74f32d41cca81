"""What tests import from each other by a bare name is one file, whatever folders are in `sys.path` by then."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def test_a_module_that_tests_import_has_a_name_of_its_own() -> None:
    every = sorted(TESTS.rglob("*.py"))
    files, users = defaultdict(list), defaultdict(list)
    for file in every:
        files[file.stem].append(file)
        for name in _imported(ast.parse(file.read_text(encoding="utf-8"))):
            users[name].append(file)
    shared = {name: places for name, places in files.items() if len(places) > 1 and users[name]}
    assert not shared, "\n".join(f"{users[name]} import {name}, one of {places}" for name, places in shared.items())


def _imported(tree: ast.AST) -> Iterator[str]:
    """When tests run, not when types are checked."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        yield from _imported(node)
