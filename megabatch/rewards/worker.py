"""A process that computes rewards: `python -m megabatch.rewards.worker REQUESTS REPLIES CALLER`, two descriptors of
pipes and the process that it works for.

It says READY once it runs. A request is a pickled (reward, samples), a reply a length and a pickled (kind, value):
`values` with one for each sample, `failed` with the exception's line, or `refused` with a message that ends the run.
What rewards print goes to stderr.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

from megabatch.errors import MegabatchError
from megabatch.rewards.sample import Reward, RewardSample, Score

LENGTH = struct.Struct("<Q")
"""Number of bytes of the reply that follows."""
READY = b"+"
_SET_DEATH_SIGNAL = 1
"""Linux, `prctl.h`."""
LONGEST = 500
"""Characters of an error that are told."""


def main() -> None:
    requests, replies, caller = (int(text) for text in sys.argv[1:4])
    _end_with(caller)
    os.dup2(2, 1)
    own = os.getpid()
    waiting: queue.SimpleQueue[tuple[Reward, Sequence[RewardSample]]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(os.fdopen(requests, "rb"), waiting), daemon=True).start()
    opened: dict[Reward, Score] = {}
    with os.fdopen(replies, "wb") as out:
        out.write(READY)
        out.flush()
        while True:
            reward, samples = waiting.get()
            reply = pickle.dumps(_reply(reward, samples, opened))
            if os.getpid() != own:  # a reward has forked, and its child has come back: a second reply
                os._exit(0)
            out.write(LENGTH.pack(len(reply)) + reply)
            out.flush()


def _end_with(caller: int) -> None:
    """On Linux the kernel ends this process when the thread that started it is gone: a reward within a regular
    expression lets no thread of this process run, `_receive` neither."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != caller:
            os._exit(0)


def _receive(requests: BinaryIO, waiting: queue.SimpleQueue[Any]) -> None:
    """Ends this process as soon as its caller is gone, even amid a reward that hangs."""
    try:
        while True:
            waiting.put(pickle.load(requests))
    except EOFError:
        os._exit(0)


def _reply(reward: Reward, samples: Sequence[RewardSample], opened: dict[Reward, Score]) -> tuple[str, Any]:
    try:
        if reward not in opened:
            opened[reward] = reward.open()
        return "values", list(opened[reward](samples))
    except MegabatchError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", _where(error)


def _where(error: Exception) -> str:
    """The error, in a line, and the last place in the traceback."""
    from traceback import extract_tb

    last = extract_tb(error.__traceback__)[-1]
    try:
        said = " ".join(str(error).split())
    except Exception as e:
        said = f"its text cannot be had ({type(e).__name__})"
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]} …"
    return f"{type(error).__name__}: {said} ({os.path.basename(last.filename)}:{last.lineno})"


if __name__ == "__main__":
    main()
