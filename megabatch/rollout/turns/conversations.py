"""Conversations of several turns over an engine: tokens are carried from turn to turn, never tokenised again.

After a turn of the model come the tokens with which the chat template closes it, the environment's messages, and the
opening of the next turn; they are context for the model and no part of the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from megabatch.rollout.engine import Completion, Finish, Request

if TYPE_CHECKING:
    import numpy as np

Scope = Literal["per_round", "total"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What ends a conversation that nobody ends."""

    max_turns: int | None
    scope: Scope
    """Whether a request's `max_tokens` limits each turn, or all tokens after the prompt."""
    positions: int
    """Tokens that the model can take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What follows a turn of the model: plain values, as one rank finds them for all."""

    ids: tuple[int, ...]
    """Tokens up to where the model goes on; none where the conversation is over."""
    reward: float | None
    done: bool
    failed: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of the model."""

    start: int
    """Its tokens are `ids[start:stop]`."""
    stop: int
    reward: float | None


@dataclass(kw_only=True)
class Conversation:
    """What was said after one prompt. `ids`, `logps`, `versions` and `mask` are of equal length."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    """0 for tokens that are not the model's."""
    versions: list[int] = field(default_factory=list)
    """Of tokens that are not the model's: the version of the turn before."""
    mask: list[int] = field(default_factory=list)
    """1 for the model's tokens."""
    turns: list[Turn] = field(default_factory=list)
    finish: Finish | None = None
    """`stop`: the environment or the model ended it; `length`: a turn was cut off, or no room or turn was left;
    `aborted`: the engine or the environment failed. None: it goes on."""
    failed: str | None = None
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """`Completion.routes`, of a single turn."""

    @classmethod
    def of(cls, request: Request, completion: Completion) -> Conversation:
        """Of a single turn."""
        assert completion.key == request.key, (completion.key, request.key)
        one = cls(request=request)
        take_turn(one, completion)
        one.finish, one.routes = completion.finish, completion.routes
        return one

    @property
    def last_turn(self) -> list[int]:
        """Tokens of the model's last turn."""
        return self.ids[self.turns[-1].start : self.turns[-1].stop]

    @property
    def key(self) -> str:
        return self.request.key

    @property
    def reward(self) -> float | None:
        """Sum of the turns' rewards; None if no turn has one."""
        found = [turn.reward for turn in self.turns if turn.reward is not None]
        return sum(found) if found else None


class Partner(Protocol):
    """Answers single conversations, each when its turn is done; for several threads at once."""

    limits: Limits

    def answer(self, one: Conversation) -> Answer:
        """Raises: RolloutError for an environment that cannot begin, or answers in no known form."""
        ...


def converse(
    requests: Sequence[Request],
    *,
    generate: Callable[[Sequence[Request]], list[Completion]],
    answer: Callable[[Sequence[Conversation]], Sequence[Answer]],
    limits: Limits,
) -> list[Conversation]:
    """Alternates the engine and the environments until every conversation is over.

    Args: `generate`: the engine's. `answer`: to the last turn of each of these conversations; where several ranks run
    this together, one of them asks the environments and all get its answers.
    """
    conversations = [Conversation(request=request) for request in requests]
    while going := [one for one in conversations if one.finish is None]:
        completions = generate([next_turn(one, limits) for one in going])
        for one, completion in zip(going, completions, strict=True):
            take_turn(one, completion)
        open_ = [one for one in going if one.finish is None]
        for one, found in zip(open_, answer(open_) if open_ else (), strict=True):
            take_answer(one, found, limits)
    return conversations


def next_turn(one: Conversation, limits: Limits) -> Request:
    """The request of the next turn; the first is the conversation's own, so that one turn is what a single one is."""
    number = len(one.turns)
    if not number:
        return one.request
    digest = hashlib.blake2b(f"{one.request.seed}/{number}".encode(), digest_size=7).digest()
    return replace(
        one.request,
        key=f"{one.key}@{number}",
        prompt=(*one.request.prompt, *one.ids),
        sampling=replace(one.request.sampling, max_tokens=_room(one, limits)),
        seed=int.from_bytes(digest, "little"),
    )


def _room(one: Conversation, limits: Limits, *, further: int = 0) -> int:
    """Most tokens of the next turn, after `further` tokens of an answer."""
    used = len(one.ids) + further
    limit = one.request.sampling.max_tokens - (used if limits.scope == "total" else 0)
    return min(limit, limits.positions - len(one.request.prompt) - used)


def take_turn(one: Conversation, completion: Completion) -> None:
    """Adds a turn of the model. A conversation whose turn did not end by itself is over."""
    start = len(one.ids)
    one.ids += completion.ids
    one.logps += completion.logps
    one.versions += completion.versions
    one.mask += [1] * len(completion.ids)
    one.turns.append(Turn(start=start, stop=len(one.ids), reward=None))
    if completion.finish != "stop":
        one.finish = completion.finish


def take_answer(one: Conversation, found: Answer, limits: Limits) -> None:
    """Where the answer leaves no room for a further turn, it is left out: nothing would learn from it."""
    one.turns[-1] = replace(one.turns[-1], reward=found.reward)
    if found.failed is not None:
        one.finish, one.failed = "aborted", found.failed
    elif found.done:
        one.finish = "stop"
    elif len(one.turns) == limits.max_turns or _room(one, limits, further=len(found.ids)) < 1:
        one.finish = "length"
    else:
        one.versions += [one.versions[-1] if one.versions else 0] * len(found.ids)
        one.ids += found.ids
        one.logps += [0.0] * len(found.ids)
        one.mask += [0] * len(found.ids)
