"""What answers the model's turns: the interface of an environment, and loading one by name.

    class Guess:                                    # one instance for each conversation
        def reset(self, messages, **columns): ...   # optional: the prompt's messages and the row's other columns
        def step(self, completion):                 # the text of the model's turn
            return "higher", 0.0, False             # answer, reward of the turn (or None), whether it is over

`step` may be async. An answer is a text, which becomes a user's message, a message (`{"role": "tool", "content": …}`),
a list of messages, or None where the conversation is over.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from megabatch.errors import ConfigError, RolloutError
from megabatch.rollout.turns.calculator import Calculator
from megabatch.user_code import load_named, names_own_code, near

SHIPPED: Mapping[str, type] = {"calculator": Calculator}
EXAMPLE = "my_games.py:Guess"
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What an environment answered to one turn."""

    messages: tuple[Message, ...]
    reward: float | None
    done: bool
    failed: str | None = None
    """Why the environment could not answer; the conversation is over."""


def environment_of(text: str) -> Callable[[], Any]:
    """The class that `multi_turn_scheduler` or `gym_env` names. Raises: ConfigError if it cannot be used."""
    if not names_own_code(text):
        if text not in SHIPPED:
            known = ", ".join(SHIPPED)
            raise ConfigError(f"must be one of {known}, or file.py:Class{near(text, SHIPPED)}")
        return SHIPPED[text]
    made, _ = load_named(text, kind="class", example=EXAMPLE)
    if not callable(getattr(made, "step", None)):
        raise ConfigError(f"{made.__name__} has no method step(completion)")
    try:
        inspect.signature(made.step).bind(None, "")
    except TypeError as error:
        raise ConfigError(f"{made.__name__}.step must take the model's text alone ({error})") from error
    found: Callable[[], Any] = made
    return found


def ask(environments: Sequence[tuple[str, Any]], texts: Sequence[str], *, timeout_s: float) -> list[Reply]:
    """One step of each (key, environment), side by side; one that raises or hangs fails alone.

    Raises: RolloutError for an answer of no known form, naming the environment and the conversation.
    """
    calls = [_Call(environment.step, text) for (_, environment), text in zip(environments, texts, strict=True)]
    for call in calls:
        call.start()
    deadline = time.monotonic() + timeout_s
    for call in calls:
        call.join(max(0.0, deadline - time.monotonic()))
    return [
        _reply(key, type(environment).__name__, call, timeout_s)
        for (key, environment), call in zip(environments, calls, strict=True)
    ]


class _Call(threading.Thread):
    """A daemon: a step that hangs does not keep the process from ending."""

    def __init__(self, function: Callable[[str], Any], text: str) -> None:
        super().__init__(daemon=True)
        self._function, self._text = function, text
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            result = self._function(self._text)
            self.result = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except BaseException as error:  # sys.exit too ends its own conversation alone
            self.error = error


async def _awaited(result: Any) -> Any:
    return await result


def _reply(key: str, name: str, call: _Call, timeout_s: float) -> Reply:
    if call.is_alive():
        return Reply(messages=(), reward=None, done=True, failed=f"{name}.step took more than {timeout_s:g} s")
    if call.error is not None:
        said = f"{name}.step: {type(call.error).__name__}: {call.error}"
        return Reply(messages=(), reward=None, done=True, failed=said)
    try:
        answer, reward, done = call.result
        return Reply(
            messages=_messages(answer),
            reward=_reward(reward),
            done=bool(done) or answer is None,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RolloutError(
            f"{name}.step returned {call.result!r:.80} in conversation {key}; must be (answer, reward, done)"
        ) from error


def _reward(value: Any) -> float | None:
    """Raises: ValueError for what is neither a finite number nor None; NaN is None."""
    number = None if value is None else float(value)
    if number is None or math.isnan(number):
        return None
    if math.isinf(number):
        raise ValueError("a reward is finite")
    return number


def _messages(answer: Any) -> tuple[Message, ...]:
    if answer is None:
        return ()
    if isinstance(answer, str):
        return ({"role": "user", "content": answer},)
    found = (answer,) if isinstance(answer, Mapping) else tuple(answer)
    if not all(isinstance(one, Mapping) and "role" in one and "content" in one for one in found):
        raise TypeError("a message has a role and a content")
    return found
