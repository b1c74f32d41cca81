"""Rollouts of several turns: an environment on the main rank answers the model, and every rank gets its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megabatch.config.grpo import Rollout
from megabatch.data.rows.prompts import Asked
from megabatch.data.tokens.templates import Template
from megabatch.errors import RolloutError
from megabatch.rewards.environment import COLUMN
from megabatch.rollout.engine import Completion, Request
from megabatch.rollout.turns.conversations import Answer, Conversation, converse
from megabatch.rollout.turns.environment import ask, environment_of
from megabatch.rollout.turns.template import between
from megabatch.trainer.ranks import Ranks

TURNS = "turns"
"""Column of rewards: the texts of the model's turns."""


@dataclass(kw_only=True)
class _Open:
    """A conversation on the main rank."""

    environment: Any
    messages: list[Mapping[str, Any]]
    """Before the model's next turn."""


@dataclass(kw_only=True)
class Turns:
    """Lets the environment of `multi_turn_scheduler` or `gym_env` answer the model."""

    ranks: Ranks
    rollout: Rollout
    text: Callable[[Sequence[int]], str]
    """Of token ids; on the main rank."""
    template: Template | None
    """None on other ranks."""
    positions: int
    _open: dict[str, _Open] = field(default_factory=dict)

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
        self.ranks.on_main(lambda: self._begin(requests, asked))
        return converse(
            requests,
            generate=generate,
            answer=lambda some: self.ranks.on_main(lambda: self._answers(some)),
            max_turns=self.rollout.max_turns,
            scope=self.rollout.completion_length_limit_scope,
            positions=self.positions,
        )

    def columns(self, one: Conversation) -> dict[str, Any]:
        """What rewards get to know of a conversation; on the main rank."""
        return {COLUMN: one.reward, TURNS: [self.text(one.ids[turn.start : turn.stop]) for turn in one.turns]}

    def _begin(self, requests: Sequence[Request], asked: Callable[[int], Asked]) -> None:
        named = self.rollout.multi_turn_scheduler or self.rollout.gym_env
        assert named is not None
        made = environment_of(named)
        self._open = {}
        for place, request in enumerate(requests):
            prompt = asked(place)
            messages = [{"role": one.role, "content": one.content} for one in prompt.conversation.messages]
            try:
                environment = made()
                if hasattr(environment, "reset"):
                    environment.reset([dict(message) for message in messages], **prompt.columns)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                raise RolloutError(f"{named} cannot begin conversation {request.key}: {said}") from error
            self._open[request.key] = _Open(environment=environment, messages=list(messages))

    def _answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        texts = [self.text(one.ids[one.turns[-1].start :]) for one in conversations]
        environments = [(one.key, self._open[one.key].environment) for one in conversations]
        replies = ask(environments, texts, timeout_s=self.rollout.turn_timeout_s)
        return [
            Answer(
                ids=() if reply.done else self._between(one, text, reply.messages),
                reward=reply.reward,
                done=reply.done,
                failed=reply.failed,
            )
            for one, text, reply in zip(conversations, texts, replies, strict=True)
        ]

    def _between(self, one: Conversation, text: str, answers: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        template, opened = self.template, self._open[one.key]
        assert template is not None, "the main rank has it"
        ids = between(
            opened.messages,
            answers,
            render=template.up_to_the_answer,
            encode=lambda part: template.tokenizer(part, add_special_tokens=False)["input_ids"],
            control_tokens=template.control_tokens,
            last_id=one.ids[-1] if one.ids else None,
        )
        opened.messages += [{"role": "assistant", "content": text}, *answers]
        return ids
