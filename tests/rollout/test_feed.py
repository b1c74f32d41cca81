"""What servers take: until it is over, with what is brought back and what comes later."""

from __future__ import annotations

import threading

from megabatch.rollout.engine import Request, Sampling
from megabatch.rollout.feed import Feed

SAMPLING = Sampling(temperature=1.0, max_tokens=4, stop_ids=())


def request(key: str) -> Request:
    return Request(key=key, prompt=(1,), sampling=SAMPLING, seed=0)


def keys(feed: Feed, count: int) -> list[str]:
    taken = [feed.take(ended=lambda: False) for _ in range(count)]
    return [one[0].key for one in taken if one is not None]


def test_what_is_brought_back_is_taken_again_with_its_tries() -> None:
    feed = Feed([request("a"), request("b")])
    assert keys(feed, 3) == ["a", "b"] and not feed.is_over, "taken is not done"
    feed.put([request("b")], tries=2)
    assert feed.take(ended=lambda: False) == (request("b"), 2)
    feed.done(["a", "b"])
    assert feed.is_over and feed.left == ()


def test_an_open_feed_waits_for_more_until_it_is_closed_or_stopped() -> None:
    feed, found = Feed(is_open=True), list[list[str]]()
    taker = threading.Thread(target=lambda: found.append(keys(feed, 2)))
    taker.start()
    feed.put([request("a")])
    feed.close()
    taker.join()
    assert found == [["a"]] and feed.left == ("a",)
    stopped = Feed([request("a")], is_open=True)
    stopped.stop()
    assert stopped.take(ended=lambda: False) is None and stopped.is_over and stopped.left == ("a",)


def test_a_taker_that_has_to_end_does_not_wait() -> None:
    feed, failed, found = Feed(is_open=True), threading.Event(), list[object]()
    taker = threading.Thread(target=lambda: found.append(feed.take(ended=failed.is_set)))
    taker.start()
    failed.set()
    feed.wake()
    taker.join()
    assert found == [None]
