"""Nodes that meet over sockets, each on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megabatch.slurm.ports import free_port_block
from megabatch.trainer.preflight.exchange import Place, gather


def meet(members: tuple[int, ...], present: list[int], *, timeout_s: float) -> list[Any]:
    port = free_port_block()

    def one(index: int) -> Any:
        place = Place("127.0.0.1", port, index, members)
        return asyncio.run(gather(place, {"index": index}, lambda values: values, timeout_s=timeout_s))

    with ThreadPoolExecutor(len(members)) as pool:
        # node 0 comes last: the others try again until it listens
        return list(pool.map(one, reversed(present)))


def test_everybody_gets_the_same_answer() -> None:
    answers = meet((0, 1, 2, 3), [0, 1, 2, 3], timeout_s=300)
    assert all(sorted(map(int, answer)) == [0, 1, 2, 3] for answer in answers)
    skews = [answer["2"]["clock_s"] for answer in answers if "2" in answer]
    assert skews and all(abs(skew) < 1 for skew in skews), "one clock for all of them here"


def test_who_does_not_come_is_missing_and_holds_nobody_up() -> None:
    answers = meet((0, 1, 2), [0, 2], timeout_s=10)
    assert [sorted(map(int, answer)) for answer in answers] == [[0, 2]] * 2


def test_the_others_go_on_among_themselves() -> None:
    answers = meet((0, 2, 5), [0, 2, 5], timeout_s=3000)  # nobody waits for those who were not invited
    assert [sorted(map(int, answer)) for answer in answers] == [[0, 2, 5]] * 3


def test_a_stranger_on_the_port_changes_nothing() -> None:
    port = free_port_block()

    async def lead() -> Any:
        return await gather(Place("127.0.0.1", port, 0, (0, 1)), {}, sorted, timeout_s=10)

    def shout() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[7, {}]\n", b'{"index": 1}\n', b"\xff\n"):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                        connection.sendall(words)
                    break
                except ConnectionRefusedError:
                    continue

    with ThreadPoolExecutor(1) as pool:
        pool.submit(shout)
        assert asyncio.run(lead()) == [0]
