"""What importing megatron-core brings along that no run needs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_wandb() -> Iterator[None]:
    """megatron-core's inference imports wandb wherever it is installed, in every rank (0.16-0.19): a sixth of a rank's
    start. A run talks to wandb in a process of its own; a user's code in a rank may still import it afterwards."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        yield
    finally:
        del sys.modules["wandb"]
