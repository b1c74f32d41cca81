"""References to what other steps make: texts that stand for paths until the chain's folder is known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megabatch.values import dataclass

_REFERENCE = re.compile(r"<output of ([^<>:]*): (hf|mcore|checkpoint|folder|file ([^<>]+))>")


@dataclass(frozen=True, slots=True)
class Reference:
    """An output of a step."""

    step: str
    what: str
    """`hf`, `mcore`, `checkpoint`, `folder`, or `file <name>`."""

    def __str__(self) -> str:
        return reference(self.step, self.what)


def reference(step: str, what: str) -> str:
    """A placeholder text for it, which may be part of a longer text (`f"--model={output('train').hf}"`)."""
    return f"<output of {step}: {what}>"


def references(value: Any) -> list[Reference]:
    """Every reference in a value's texts, including those inside dataclasses, mappings and sequences."""
    return list(dict.fromkeys(Reference(m[1], m[2]) for text in _texts(value) for m in _REFERENCE.finditer(text)))


def resolved(value: Any, path: Callable[[Reference], str]) -> Any:
    """The value with each reference replaced by its path."""
    return _changed(value, lambda text: _REFERENCE.sub(lambda m: path(Reference(m[1], m[2])), text))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _texts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = {f.name: _changed(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **new)
    if isinstance(value, Mapping):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, change) for item in value)
    return value
