"""What messages tell people to change exists: every `group.parameter` in a text is a declared one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megabatch.config.declare import group_types, parameters
from megabatch.config.recipe import Recipe

ROOT = Path(__file__).parent.parent
FILES = ("log", "pkl", "safetensors", "json")
"""Endings of files whose names look the same."""
DOTTED = re.compile(rf"(?<![\w./`-])(?:{'|'.join(group_types(Recipe))})\.[a-z][a-z0-9_]*[a-z0-9](?![\w.(])")


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_parameters_in_messages_are_declared() -> None:
    declared = {parameter.dotted for parameter in parameters(Recipe)}
    rooms = ("megabatch", "slurm", "converters")
    sources = {path.resolve() for room in rooms for path in (ROOT / room).rglob("*.py")}
    found = {
        (str(path.relative_to(ROOT)), line, name)
        for path in sources
        for line, text in _texts(path)
        for name in DOTTED.findall(text)
        if name.rpartition(".")[2] not in FILES
    }
    assert any(name == "data.max_length" for _, _, name in found)
    assert sorted(one for one in found if one[2] not in declared) == []
