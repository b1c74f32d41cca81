"""Whether megatron-core has the fields that `megatron_extra_kwargs` names, read from its source, not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault

_FILES = ("core/model_parallel_config.py", "core/transformer/transformer_config.py")
"""Where megatron-core declares TransformerConfig and its bases."""


def unknown_fields(recipe: Recipe) -> Iterator[Fault]:
    """Names that the installed megatron-core does not know; none where it is not installed, or has moved the class."""
    named = recipe.training.megatron_extra_kwargs
    if not named or not (known := _fields()):
        return
    for name in sorted(set(named) - known):
        near = tuple(get_close_matches(name, known, n=1))
        rule = f"names {name}, which is no field of this megatron-core's TransformerConfig"
        yield Fault("training.megatron_extra_kwargs", None, rule, try_=near, bare=True)


def _fields() -> set[str]:
    found = find_spec("megatron")  # a namespace package: its parts may lie in several folders
    for folder in map(Path, (found.submodule_search_locations or ()) if found else ()):
        files = [folder / file for file in _FILES]
        if all(file.is_file() for file in files):
            return _fields_of("TransformerConfig", {name: body for file in files for name, body in _classes(file)})
    return set()


def _classes(file: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    for item in ast.parse(file.read_bytes()).body:
        if isinstance(item, ast.ClassDef):
            yield item.name, item


def _fields_of(name: str, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """The annotated names of a dataclass and its bases; none if one of these is not among `classes`."""
    if name not in classes:
        return set()
    own = {
        line.target.id
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    inherited = [_fields_of(ast.unparse(base), classes) for base in classes[name].bases]
    return own.union(*inherited) if all(inherited) else set()
