"""Watching a run while it trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Watching:
    """What is looked at in every step, and what happens when it looks wrong."""

    check_for_nan_in_loss_and_grad: Literal["stop", "skip", "warn"] = param("stop")
    """A loss or gradient norm that is NaN or infinite: `stop` ends the run before the update, `skip` leaves the update
    out, `warn` takes it all the same. Each says which ranks and samples."""
    check_for_spiky_loss: Literal["stop", "skip", "warn"] | None = param(None)
    """The same for a loss or gradient norm far above those before it: `spiky_loss_sigma` standard deviations above the
    mean of the last `spiky_loss_window` steps. None looks for none."""
    spiky_loss_window: int = param(128, at_least=2)
    """Steps whose losses and gradient norms a new one is compared with, once there are half as many."""
    spiky_loss_sigma: float = param(6.0, above=0)
    """Standard deviations above the mean from which it is a spike."""
    profile_steps: str | None = param(None)
    """Steps to trace with torch's profiler, `10:12` for 10, 11 and 12; the traces are in `profile` inside the run
    directory, for Perfetto or chrome://tracing."""
    profile_ranks: Sequence[int] = param((0,))
    """Ranks that trace them."""
    callbacks: Sequence[str] = param(())
    """Classes of your own that are told of steps, evaluations and checkpoints, as `file.py:Class`."""

    def __post_init__(self) -> None:
        freeze_lists(self)


def profiled(steps: str) -> range:
    """The steps that `profile_steps` means. Raises: ValueError for a text that is no such window."""
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", steps)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(steps)
    return range(int(found[1]), int(found[2]) + 1)
