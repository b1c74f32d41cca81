"""megatron-core's process groups, which it keeps in variables of a module: those of one layout at a time.

Layers ask that module for their groups while they are built and run, and so do schedules. For a second model that is
split otherwise over the same ranks, the groups of its layout stand there while it is used, and the policy's at all
other times. (megatron-core 0.16 takes groups as arguments too, but not everywhere: embeddings, mappings of tensor
parallelism and the dispatchers of experts still ask the module.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_VARIABLE = re.compile(r"_[A-Z][A-Z0-9_]*")


class Groups:
    """The groups of one layout. Every function of `parallel_state` is a method, and answers for this layout."""

    def __init__(self, *, beside: Groups | None = None, **sizes: Any) -> None:
        """Makes them; collective. Without `beside` they stay in use; with it, theirs do.

        Args: sizes: of megatron-core's `initialize_model_parallel`.
        """
        from megatron.core import parallel_state

        self._module: Any = parallel_state
        before = _variables(parallel_state)
        self._blank: dict[str, Any] = before if beside is None else beside._blank
        if beside is not None:
            vars(parallel_state).update(self._blank)
        try:
            parallel_state.initialize_model_parallel(**sizes)
            self._values = _variables(parallel_state)
        finally:
            if beside is not None:
                vars(parallel_state).update(before)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._asked, getattr(self._module, name))

    def _asked(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.in_use():
            return function(*args, **kwargs)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside this context megatron-core sees these groups."""
        if vars(self._module)["_MODEL_PARALLEL_GROUP"] is self._values["_MODEL_PARALLEL_GROUP"]:
            yield
            return
        before = _variables(self._module)
        vars(self._module).update(self._values)
        try:
            yield
        finally:
            vars(self._module).update(before)


def _variables(module: Any) -> dict[str, Any]:
    """Their values; a dict is copied, which megatron-core fills."""
    found = {name: value for name, value in vars(module).items() if _VARIABLE.fullmatch(name)}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in found.items()}
