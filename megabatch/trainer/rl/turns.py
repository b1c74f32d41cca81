"""Rollouts of several turns: an environment on the main rank answers the model, and every rank gets its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megabatch.config.grpo import Rollout
from megabatch.data.rows import formats
from megabatch.data.rows.prompts import Asked
from megabatch.data.tokens.templates import Template
from megabatch.errors import RolloutError
from megabatch.rewards.environment import COLUMN, TURNS
from megabatch.rollout.engine import Completion, Request
from megabatch.rollout.turns.conversations import Answer, Conversation, Limits, converse
from megabatch.rollout.turns.environment import ask, environment_of
from megabatch.rollout.turns.template import between
from megabatch.trainer.ranks import Ranks


@dataclass(kw_only=True)
class _Open:
    """A conversation on the main rank."""

    environment: Any
    said: formats.Conversation
    """Before the model's next turn, with what the chat template reads of the row."""

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> formats.Conversation:
        return replace(self.said, messages=[*self.said.messages, *map(_message, messages)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """Lets the environment of `multi_turn_scheduler` or `gym_env` answer the model."""

    ranks: Ranks
    rollout: Rollout
    text: Callable[[Sequence[int]], str]
    """Of token ids; on the main rank."""
    template: Template | None
    """None on other ranks."""
    positions: int
    _encoding: threading.Lock = field(default_factory=threading.Lock)
    """Held for the template and its tokenizer: conversations that go on beside training are answered in threads."""

    @property
    def limits(self) -> Limits:
        rollout = self.rollout
        return Limits(
            max_turns=rollout.max_turns,
            scope=rollout.completion_length_limit_scope,
            positions=self.positions,
        )

    def converse(
        self,
        requests: Sequence[Request],
        *,
        asked: Callable[[int], Asked],
        generate: Callable[[Sequence[Request]], list[Completion]],
    ) -> list[Conversation]:
        """Collective. Args: `asked`: the prompt of a request by its place; called on the main rank.

        Raises: RolloutError on every rank for an environment that cannot begin, or answers in no known form.
        """
        opened: dict[str, _Open] = {}

        def begin() -> None:
            made = environment_of(self._named)
            opened.update({one.key: self._begun(made, one.key, asked(place)) for place, one in enumerate(requests)})

        self.ranks.on_main(begin)
        return converse(
            requests,
            generate=generate,
            answer=lambda some: self.ranks.on_main(lambda: self.answers(some, opened)),
            limits=self.limits,
        )

    def partner(self, asked: Callable[[str], Asked]) -> OpenedWhenAsked:
        """What answers on the main rank while the ranks train. Args: `asked`: the prompt of a conversation."""
        made = environment_of(self._named)
        return OpenedWhenAsked(self, lambda key: self._begun(made, key, asked(key)))

    def columns(self, one: Conversation) -> dict[str, Any]:
        """What rewards get to know of a conversation; on the main rank."""
        return {COLUMN: one.reward, TURNS: [self.text(one.ids[turn.start : turn.stop]) for turn in one.turns]}

    @property
    def _named(self) -> str:
        named = self.rollout.multi_turn_scheduler or self.rollout.gym_env
        assert named is not None
        return named

    def _begun(self, made: Callable[[], Any], key: str, prompt: Asked) -> _Open:
        messages = [{"role": one.role, "content": one.content} for one in prompt.conversation.messages]
        try:
            environment = made()
            if hasattr(environment, "reset"):
                environment.reset(messages, **prompt.columns)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise RolloutError(f"{self._named} cannot begin conversation {key}: {said}") from error
        return _Open(environment=environment, said=prompt.conversation)

    def answers(self, conversations: Sequence[Conversation], opened: Mapping[str, _Open]) -> list[Answer]:
        """On the main rank. Raises: RolloutError for an environment that answers in no known form."""
        with self._encoding:
            texts = [self.text(one.last_turn) for one in conversations]
        environments = [(one.key, opened[one.key].environment) for one in conversations]
        replies = ask(environments, texts, timeout_s=self.rollout.turn_timeout_s)
        with self._encoding:
            return [
                Answer(
                    ids=() if reply.done else self._between(one, opened[one.key], text, reply.messages),
                    reward=reply.reward,
                    done=reply.done,
                    failed=reply.failed,
                )
                for one, text, reply in zip(conversations, texts, replies, strict=True)
            ]

    def _between(
        self, one: Conversation, opened: _Open, text: str, answers: Sequence[Mapping[str, Any]]
    ) -> tuple[int, ...]:
        template = self.template
        assert template is not None, "the main rank has it"
        ids = between(
            answers,
            render=lambda messages: template.up_to_the_answer(opened.with_messages(messages)),
            encode=lambda part: template.tokenizer(part, add_special_tokens=False)["input_ids"],
            control_tokens=template.control_tokens,
            last_id=one.ids[-1] if one.ids else None,
        )
        opened.said = opened.with_messages([{"role": "assistant", "content": text}, *answers])
        return ids


def _message(given: Mapping[str, Any]) -> formats.Message:
    fields = {name: value for name, value in given.items() if name not in ("role", "content")}
    return formats.Message(given["role"], str(given["content"]), fields=fields)


class OpenedWhenAsked:
    """Answers single conversations, with environments that begin when their first turn is done."""

    def __init__(self, turns: Turns, begun: Callable[[str], _Open]) -> None:
        self.limits = turns.limits
        self._turns, self._begun = turns, begun
        self._opened: dict[str, _Open] = {}

    def answer(self, one: Conversation) -> Answer:
        """Raises: RolloutError."""
        if one.key not in self._opened:
            self._opened[one.key] = self._begun(one.key)
        (found,) = self._turns.answers([one], self._opened)
        if found.done or found.failed:
            del self._opened[one.key]
        return found
