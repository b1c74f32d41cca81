"""What is generated ahead: interrupted, continued with the version of each token kept, and handed out once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megabatch.errors import RolloutError
from megabatch.rollout.ahead import Ahead
from megabatch.rollout.engine import Completion, Finish, Request, Sampling, UnservedError
from megabatch.rollout.feed import Feed
from megabatch.rollout.turns.conversations import Answer, Conversation, Limits

SAMPLING = Sampling(temperature=1.0, max_tokens=6, stop_ids=())


def request(key: str, *, tokens: int = 6, seed: int = 7) -> Request:
    return Request(
        key=key, prompt=(1, 2), sampling=Sampling(temperature=1.0, max_tokens=tokens, stop_ids=()), seed=seed
    )


class Engine:
    """Draws the token 100 * version + its place in the text. Requests in `short` are done at once; others have two
    tokens, and wait for the stop."""

    def __init__(self) -> None:
        self.version = 0
        self.short: set[str] = set()
        self.asked: list[Request] = []
        self.errors: list[RolloutError] = []
        self.finish: Finish = "length"
        """Of those that are done."""

    def stream(self, feed: Feed) -> Iterator[list[Completion]]:
        if self.errors:
            raise self.errors.pop(0)
        rest: list[Request] = []
        while (taken := feed.take(ended=lambda: False)) is not None:
            one, _ = taken
            self.asked.append(one)
            if one.key in self.short:
                feed.done([one.key])
                yield [self._made(one, one.sampling.max_tokens)]
            else:
                rest.append(one)
        if rest:
            assert feed.is_stopped, "nothing ends them"
            yield [self._made(one, 2, finish="aborted") for one in rest]

    def _made(self, one: Request, tokens: int, *, finish: Finish | None = None) -> Completion:
        places = range(len(one.prompt), len(one.prompt) + tokens)
        return Completion(
            key=one.key,
            ids=tuple(100 * self.version + place for place in places),
            logps=tuple(-float(place) for place in places),
            versions=(self.version,) * tokens,
            finish=finish or self.finish,
        )


def test_each_completion_goes_on_behind_its_tokens() -> None:
    engine = Engine()
    ahead = Ahead(engine.stream)
    ahead.begin([request("a"), request("b")])
    assert engine.asked == [], "held at first"
    for version in (0, 1):
        engine.version = version
        ahead.go_on()
        ahead.hold()
    engine.version, engine.short = 2, {"a", "b"}
    ahead.go_on()
    a, b = ahead.take(["a", "b"])
    assert a.ids == [2, 3, 104, 105, 206, 207] and a.versions == [0, 0, 1, 1, 2, 2]
    assert a.logps == [-float(place) for place in range(2, 8)] and a.finish == "length"
    assert (b.key, b.ids) == ("b", a.ids)
    parts = [one for one in engine.asked if one.key == "a"]
    assert [one.sampling.max_tokens for one in parts] == [6, 4, 2]
    assert [one.prompt for one in parts] == [(1, 2), (1, 2, 2, 3), (1, 2, 2, 3, 104, 105)]
    assert parts[0].seed == 7 and len({one.seed for one in parts}) == 3, "else a part repeats the numbers of the first"


def test_what_is_done_is_handed_out_once_while_others_go_on() -> None:
    engine = Engine()
    engine.short = {"a"}
    ahead = Ahead(engine.stream)
    ahead.begin([request("a"), request("b")])
    ahead.go_on()
    assert [one.key for one in ahead.take(["a"])] == ["a"]
    assert (ahead.unfinished, ahead.landed) == (1, 0)
    ahead.begin([request("b")])
    assert len(engine.asked) == 2, "what is begun already is not begun again"
    engine.short = {"b", "c"}
    ahead.begin([request("c")])
    ahead.go_on()
    assert [len(one.ids) for one in ahead.take(["c"])] == [6]
    assert ahead.take(["b"])[0].ids == [2, 3, 4, 5, 6, 7]
    with pytest.raises(KeyError):
        ahead.take(["b"])


def test_lost_servers_cost_no_token() -> None:
    engine = Engine()
    ahead = Ahead(engine.stream)
    ahead.begin([request("a")])
    ahead.go_on()
    ahead.hold()
    engine.errors, engine.version = [UnservedError("no server is left", ())], 1
    ahead.go_on()
    with pytest.raises(UnservedError, match="no server is left"):
        ahead.take(["a"])
    ahead.hold()
    engine.short, engine.version = {"a"}, 2
    ahead.go_on()
    assert ahead.take(["a"])[0].versions == [0, 0, 2, 2, 2, 2]


def test_an_error_reaches_the_one_who_waits() -> None:
    engine = Engine()
    ahead = Ahead(engine.stream)
    for error, words in ((RolloutError("refused"), "refused"), (ValueError("odd"), "failed: ValueError: odd")):
        engine.errors = [error]  # type: ignore[list-item]
        ahead.begin([request("a")])
        ahead.go_on()
        with pytest.raises(RolloutError, match=words):
            ahead.take(["a"])
        ahead.hold()


def test_completions_that_someone_else_ends_are_not_waited_for() -> None:
    engine = Engine()

    def ended(feed: Feed) -> Iterator[list[Completion]]:
        taken = feed.take(ended=lambda: False)
        assert taken is not None
        yield [engine._made(taken[0], 2, finish="aborted")]

    ahead = Ahead(ended)
    ahead.begin([request("a")])
    ahead.go_on()
    with pytest.raises(UnservedError, match="1 completions were ended by another user of the servers"):
        ahead.take(["a"])


class Environment:
    """Answers each turn with the token 9, when it may, and ends conversations after their third turn."""

    limits = Limits(max_turns=None, scope="per_round", positions=100)

    def __init__(self) -> None:
        self.may, self.asked = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def answer(self, one: Conversation) -> Answer:
        self.asked.set()
        assert self.may.wait(60)
        if self.error is not None:
            raise self.error
        return Answer(ids=(9,), reward=float(len(one.turns)), done=len(one.turns) == 3)


def conversation(*, tokens: int = 2) -> tuple[Engine, Ahead, Environment]:
    engine, environment = Engine(), Environment()
    engine.finish, engine.short = "stop", {"a", "a@1", "a@2"}
    ahead = Ahead(engine.stream)
    ahead.begin([request("a", tokens=tokens)], environment)
    return engine, ahead, environment


def test_a_conversation_goes_on_turn_by_turn() -> None:
    engine, ahead, environment = conversation()
    environment.may.set()
    ahead.go_on()
    (one,) = ahead.take(["a"])
    assert one.ids == [2, 3, 9, 5, 6, 9, 8, 9] and one.mask == [1, 1, 0, 1, 1, 0, 1, 1] and one.finish == "stop"
    assert [turn.reward for turn in one.turns] == [1, 2, 3]
    assert [asked.key for asked in engine.asked] == ["a", "a@1", "a@2"]
    assert len({asked.seed for asked in engine.asked}) == 3


def test_an_update_interrupts_a_turn_and_no_environment() -> None:
    """The environment answers while the engine is held; the next turn begins with the new weights, is interrupted
    in its middle, and goes on."""
    engine, ahead, environment = conversation(tokens=4)
    engine.short = {"a", "a@2"}
    ahead.go_on()
    assert environment.asked.wait(60)
    ahead.hold()
    engine.version = 1
    environment.may.set()
    ahead.go_on()
    while len(engine.asked) < 2:
        ahead.hold()
        ahead.go_on()
    ahead.hold()
    assert {asked.key for asked in engine.asked} == {"a", "a@1"} and ahead.unfinished == 1
    engine.version, engine.short = 2, {"a@1", "a@2"}
    ahead.go_on()
    (one,) = ahead.take(["a"])
    assert one.ids[:7] == [2, 3, 4, 5, 9, 107, 108]
    assert list(one.versions) == sorted(one.versions) and set(one.versions) == {0, 1, 2}
    assert [turn.stop - turn.start for turn in one.turns] == [4, 4, 4]


def test_an_environment_that_cannot_answer_ends_the_wait() -> None:
    for error, words in (
        (RolloutError("no form"), "no form"),
        (ValueError("odd"), "answering a failed: ValueError: odd"),
    ):
        _, ahead, environment = conversation()
        environment.error = error
        environment.may.set()
        ahead.go_on()
        with pytest.raises(RolloutError, match=words):
            ahead.take(["a"])
        ahead.hold()
