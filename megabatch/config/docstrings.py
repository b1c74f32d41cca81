"""The docstrings beneath fields, read from the source; only help and the generated reference ask for them."""

from __future__ import annotations

import ast
import functools
import inspect
import sys


def field_docs(group_type: type) -> dict[str, str]:
    """Field name → the docstring right beneath it, for each documented field of a dataclass."""
    return _docs_of_module(group_type.__module__).get(group_type.__name__, {})


@functools.cache
def _docs_of_module(module: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _docs_of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of_class(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if (
            isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[statement.target.id] = inspect.cleandoc(below.value.value)
    return docs
