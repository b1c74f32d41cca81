"""Gathers one value from each node at node 0 and answers all, over plain sockets.

No torch: a node whose torch hangs must be found by one that does not need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_RETRY_S = 0.1
_LIMIT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Place:
    """Where the nodes meet, and which of them this is."""

    address: str
    port: int
    index: int
    members: tuple[int, ...]
    """Nodes that are expected, 0 among them."""


Values = dict[int, Any]
"""What came, by node; who is missing did not answer in time."""


async def gather(place: Place, value: Any, answer: Callable[[Values], Any], *, timeout_s: float) -> Any:
    """Node 0's `answer` to the values of all nodes, on every node; `answer` is called on node 0 alone.

    Each value arrives with `clock_s`, how far that node's clock is ahead of node 0's, when it is a dict.
    Raises: TimeoutError or OSError when node 0 is not reached.
    """
    if len(place.members) == 1:
        return answer({0: value})
    if place.index == 0:
        return await _lead(place, value, answer, timeout_s=timeout_s)
    # node 0 answers once its own time is over, so it must be given longer than that
    return await asyncio.wait_for(_follow(place, value), timeout_s * 2)


async def _lead(place: Place, value: Any, answer: Callable[[Values], Any], *, timeout_s: float) -> Any:
    values: Values = {0: value}
    complete = asyncio.Event()
    decided: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a stranger on this port
            writer.write(f"{time.time()}\n".encode())
            index, theirs = json.loads(await reader.readline())
            if index in place.members[1:]:
                values[index] = theirs
            if len(values) == len(place.members):
                complete.set()
            writer.write(json.dumps(await asyncio.shield(decided)).encode() + b"\n")
            await writer.drain()
        writer.close()
        serving.discard(task)

    async with await asyncio.start_server(serve, port=place.port, limit=_LIMIT_BYTES, reuse_address=True):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(complete.wait(), timeout_s)
        decided.set_result(answer(values))
        if serving:
            await asyncio.wait(set(serving), timeout=5)
    return decided.result()


async def _follow(place: Place, value: Any) -> Any:
    while True:
        try:
            asked = time.time()
            reader, writer = await asyncio.open_connection(place.address, place.port, limit=_LIMIT_BYTES)
            theirs = float(await reader.readline())
        except (OSError, ValueError):  # node 0 does not listen yet
            await asyncio.sleep(_RETRY_S)
            continue
        clock_s = (asked + time.time()) / 2 - theirs
        sent = value | {"clock_s": clock_s} if isinstance(value, dict) else value
        writer.write(json.dumps([place.index, sent]).encode() + b"\n")
        await writer.drain()
        answer = json.loads(await reader.readline())
        writer.close()
        return answer
