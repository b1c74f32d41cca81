"""Processes that compute rewards, each limited in time; one that crashes or hangs is replaced."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megabatch.errors import RewardError
from megabatch.own_code import PACKAGE
from megabatch.rewards.sample import Reward, RewardSample
from megabatch.rewards.worker import LENGTH, READY
from megabatch.values import dataclass

STARTING_S = 300.0
"""A new process may take so long until it runs, which is not the reward's time: the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a call gave no values."""

    reason: str
    hung: bool = False
    """Whether it took too long."""


@dataclass(frozen=True, slots=True)
class Call:
    """Samples that a reward is given together."""

    reward: Reward
    samples: Sequence[RewardSample]


class Pool:
    """Up to `size` processes, started when first needed. Every call gets `timeout_s`; loading its reward counts, the
    start of its process does not."""

    def __init__(self, size: int, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(max_workers=size, thread_name_prefix="rewards")
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def map(self, calls: Iterable[Call]) -> list[list[Any] | Failed]:
        """The values of each call, in order. Raises: RewardError with the message of a reward that was refused."""
        return list(self._threads.map(self._run, calls))

    def close(self) -> None:
        """Ends the processes; waits for none."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if (process := self._idle.get()) is not None:
                process.kill()

    def _run(self, call: Call) -> list[Any] | Failed:
        process = self._idle.get()
        try:
            process = process or _Process()
            kind, value = process.call(call, timeout_s=self._timeout_s)
        except _EndedError as ended:
            assert process is not None
            process.kill()
            process = None
            return Failed(str(ended), hung=isinstance(ended, _HungError))
        finally:
            self._idle.put(process)
        if kind == "refused":
            raise RewardError(value)
        return value if kind == "values" else Failed(value)


class _EndedError(Exception):
    """The process ended or had to be ended."""


class _HungError(_EndedError):
    """It took too long."""


class _Process:
    """One worker and the pipes to it."""

    def __init__(self) -> None:
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megabatch.rewards.worker", str(theirs_in), str(theirs_out), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._ready = False

    def call(self, call: Call, *, timeout_s: float) -> tuple[str, Any]:
        """Raises: _EndedError, of which _HungError."""
        if not self._ready:
            self._receive(len(READY), time.monotonic() + STARTING_S, STARTING_S)
            self._ready = True
        deadline = time.monotonic() + timeout_s
        self._send(pickle.dumps((call.reward, list(call.samples))))
        (size,) = LENGTH.unpack(self._receive(LENGTH.size, deadline, timeout_s))
        kind, value = pickle.loads(self._receive(size, deadline, timeout_s))  # our own worker's
        return kind, value

    def _receive(self, size: int, deadline: float, timeout_s: float) -> bytes:
        received = bytearray()
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        while len(received) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _HungError(f"took more than {timeout_s:g} s")
            if not (part := os.read(self._replies, size - len(received))):
                raise _EndedError(self._how_it_ended())
            received += part
        return bytes(received)

    def kill(self) -> None:
        """Ends the process with all that it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._requests)
        os.close(self._replies)

    def _send(self, request: bytes) -> None:
        left = memoryview(request)
        try:
            while left:
                left = left[os.write(self._requests, left) :]
        except BrokenPipeError:
            raise _EndedError(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"
