"""A stop request from the launcher, Slurm or a person."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Remembers SIGUSR2, SIGTERM and SIGINT; the loop checks it every step, and all ranks stop after the same step."""

    SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        for number in self.SIGNALS:
            signal.signal(number, self._remember)
        # a request made before these handlers were there: its signal was ignored, its file is not
        request = os.environ.get("MEGABATCH_STOP_REQUEST")
        if request and os.path.exists(request):
            self.requested = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
