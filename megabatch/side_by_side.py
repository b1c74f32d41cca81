"""Many small file operations at once: on a shared file system each of them waits for a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
_AT_ONCE = 4


def side_by_side(do: Callable[[T], object], items: Iterable[T]) -> None:
    """Calls `do` with each item, in a few threads; what one of them raises is raised once all have ended."""
    from concurrent.futures import ThreadPoolExecutor  # a tenth of a dry run's imports, which needs none

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for _ in threads.map(do, items):
            pass
