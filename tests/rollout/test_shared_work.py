"""Work that threads share: everything is done once, by whoever is there."""

from __future__ import annotations

import threading
from dataclasses import replace

from megabatch.rollout.shared_work import SharedWork


def test_what_one_brings_back_another_does() -> None:
    work: SharedWork[int, int] = SharedWork(range(20))
    brought_back = threading.Event()
    ends = []

    def leaves() -> None:
        piece = work.take()
        assert piece is not None
        work.put_back(replace(piece, failing_since=1.0))
        brought_back.set()

    def stays() -> None:
        while (piece := work.take()) is not None:
            if piece.number == 19 and piece.failing_since is None:
                brought_back.wait()
            work.done(piece, piece.item**2)
        ends.append(work.is_done)

    threads = [threading.Thread(target=one) for one in (leaves, stays, stays)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.results == [number**2 for number in range(20)] and ends == [True, True]


def test_takers_wait_for_what_may_come_back_until_the_end() -> None:
    work: SharedWork[str, str] = SharedWork(["only"])
    piece, others = work.take(), []
    waits = threading.Thread(target=lambda: others.append(work.take()))
    waits.start()
    assert piece is not None and not work.is_over_within(0.01) and not work.is_done
    work.end()
    waits.join()
    assert others == [None] and work.is_over_within(60) and not work.is_done
    assert work.take() is None
    assert SharedWork[str, str]([]).take() is None
