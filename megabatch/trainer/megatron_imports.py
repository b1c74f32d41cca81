"""What importing megatron-core brings along that no run needs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_TRACKERS = ("wandb", "torch.utils.tensorboard")


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """megatron-core imports wandb and TensorBoard's writer wherever they are installed, in every rank (0.16-0.19): a
    sixth of a rank's start. A run talks to wandb in a process of its own, and only the rank that logs needs the
    writer; it, and a user's code in a rank, may still import them afterwards."""
    absent = [name for name in _TRACKERS if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
