"""Prompts → completions with rewards: what a round and an evaluation share. Every rank calls everything together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from megabatch.config.grpo import Rollout
from megabatch.data.rows.prompts import Asked
from megabatch.data.rows.turns import as_mapping
from megabatch.errors import DataError
from megabatch.rewards.rewards import Rewards, Scores
from megabatch.rewards.sample import RewardSample
from megabatch.rl.rounds import Rolled, Sum
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.turns.conversations import Conversation, Partner
from megabatch.trainer.engine import Engine
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.rl.prompts import Language, Prompt, Prompts
from megabatch.trainer.rl.turns import Turns
from megabatch.trainer.sums import Ratio
from megabatch.trainer.sync.rollouts import Taken


class Rollouts(Protocol):
    """The engines of a run (`trainer.sync.rollouts`), as far as GRPO uses them."""

    def update(self, engine: Engine, version: int) -> Mapping[str, Ratio]: ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def begin(self, requests: Sequence[Request], partner: Partner | None = None) -> None: ...

    def take(self, requests: Sequence[Request]) -> Taken: ...

    def go_on(self) -> None: ...

    def hold(self) -> None: ...

    def rest(self, level: int) -> None: ...


@dataclass(kw_only=True)
class Policy:
    """Which version of the policy the trainer has, and which the engines have."""

    trained: int = 0
    """Optimizer steps of the run so far."""
    given: int | None = None


def sampling_of(rollout: Rollout, language: Language) -> Sampling:
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k or -1,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=rollout.max_completion_length,
        stop_ids=language.stop_ids,
    )


def seed_of(seed: int, key: str) -> int:
    """Of a request's draws. Args: seed: of the run; key: of the request."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest(), "little")


@dataclass(kw_only=True)
class Generator:
    """Generates and rewards."""

    ranks: Ranks
    rollouts: Rollouts
    rewards: Rewards | None
    """None on ranks other than the main one."""
    reward_names: tuple[str, ...]
    language: Language
    sampling: Sampling
    policy: Policy
    seed: int
    positions: int
    """Tokens that the model can take."""
    sleep_level: int
    busy: Callable[[], None]
    turns: Turns | None = None
    """What answers the model; None for completions of a single turn."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent since `take_metrics`."""
    synced: dict[str, Ratio] = field(default_factory=dict)

    def give_policy(self, engine: Engine) -> None:
        """Gives the engines the trainer's weights, unless they have them. Raises: RolloutError on every rank."""
        if self.policy.given != self.policy.trained:
            self.synced = dict(self.rollouts.update(engine, self.policy.trained))
            self.policy.given = self.policy.trained
            self.busy()

    def rest(self) -> None:
        """Frees what `sleep_level` says, until the next update, and the trainer may train; what was begun goes on."""
        self.rollouts.go_on()
        self.rollouts.rest(self.sleep_level)
        if self.sleep_level:
            self.policy.given = None

    def begin(self, prompts: Prompts, drawn: Sequence[Prompt], *, each: int, name: str) -> None:
        """Has completions generated while the ranks train, for `rewarded` to take; begun ones stay as they are."""
        requests = self._requests(drawn, each=each, name=name)
        self.rollouts.begin(requests, self._partner(prompts, requests, _indices(drawn, each)))

    def rewarded(
        self,
        prompts: Prompts,
        drawn: Sequence[Prompt],
        *,
        each: int,
        name: str,
        greedy: bool = False,
        begun: bool = False,
    ) -> list[Rolled]:
        """`each` completions of every prompt, side by side. Args: `name`: begins their keys, unique in the run;
        `begun`: whether they were begun by `begin`."""
        requests = self._requests(drawn, each=each, name=name, greedy=greedy)
        indices = _indices(drawn, each)
        with self.timed("wait_s" if begun else "generate_s"):
            if begun:
                conversations = self._taken(requests)
            else:
                conversations = self._conversations(requests, lambda place: prompts.asked(indices[place]))
        self.busy()
        with self.timed("reward_s"):
            scores = self.ranks.on_main(lambda: self._scores(prompts, indices, conversations))
        self.busy()
        places = [prompt.place for prompt in drawn for _ in range(each)]
        return [
            _rolled(conversation, place, values, has_turns=self.turns is not None)
            for conversation, place, values in zip(conversations, places, scores.values, strict=True)
        ]

    def _taken(self, requests: Sequence[Request]) -> list[Conversation]:
        taken = self.rollouts.take(requests)
        counts = {"in_flight": taken.unfinished, "landed": taken.landed}
        self.synced |= {name: Ratio(float(count), 1.0) for name, count in counts.items()}
        return taken.conversations

    def _conversations(self, requests: Sequence[Request], asked: Callable[[int], Asked]) -> list[Conversation]:
        if self.turns is None:
            completions = self.rollouts.generate(requests)
            return [Conversation.of(request, one) for request, one in zip(requests, completions, strict=True)]
        return self.turns.converse(requests, asked=asked, generate=self._turn)

    def _partner(self, prompts: Prompts, requests: Sequence[Request], indices: Sequence[int]) -> Partner | None:
        """What answers conversations that go on beside training; on the main rank."""
        if self.turns is None or not self.ranks.is_main:
            return None
        index_of = {request.key: index for request, index in zip(requests, indices, strict=True)}
        return self.turns.partner(lambda key: prompts.asked(index_of[key]))

    def _turn(self, requests: Sequence[Request]) -> list[Completion]:
        self.busy()
        return self.rollouts.generate(requests)

    def take_metrics(self) -> dict[str, Sum]:
        """Seconds and differences since the last call."""
        found: dict[str, Sum] = {name: (seconds, 1.0) for name, seconds in self.seconds.items()}
        found |= {name: (ratio.total, ratio.count) for name, ratio in self.synced.items()}
        self.seconds, self.synced = {}, {}
        return found

    def _requests(self, drawn: Sequence[Prompt], *, each: int, name: str, greedy: bool = False) -> list[Request]:
        return [
            self._request(prompt, f"{name}/{place}/{number}", greedy=greedy)
            for place, prompt in enumerate(drawn)
            for number in range(each)
        ]

    def _request(self, prompt: Prompt, key: str, *, greedy: bool) -> Request:
        room = self.positions - len(prompt.ids)
        if room < 1:
            raise DataError(
                f"{prompt.place}: the prompt has {len(prompt.ids)} tokens, and the model takes {self.positions}, "
                "the completion included; lower data.max_length"
            )
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
        return Request(
            key=key,
            prompt=prompt.ids,
            sampling=replace(sampling, top_k=1) if greedy else sampling,
            seed=seed_of(self.seed, key),
        )

    def _scores(self, prompts: Prompts, indices: Sequence[int], conversations: Sequence[Conversation]) -> Scores:
        assert self.rewards is not None
        asked = {index: prompts.asked(index) for index in set(indices)}
        return self.rewards.of(
            [
                RewardSample(
                    key=one.key,
                    prompt=[as_mapping(message) for message in asked[index].conversation.messages],
                    completion=self.language.text(one.last_turn),
                    ids=one.ids,
                    truncated=one.finish != "stop",
                    columns=asked[index].for_rewards | (self.turns.columns(one) if self.turns else {}),
                )
                for index, one in zip(indices, conversations, strict=True)
            ]
        )

    def timed(self, name: str) -> _Timed:
        """Adds the time of what is done inside to the round's metric of this name."""
        return _Timed(self.seconds, name)


def _indices(drawn: Sequence[Prompt], each: int) -> list[int]:
    """The prompt of each completion."""
    return [prompt.index for prompt in drawn for _ in range(each)]


class _Timed:
    """Adds the time of what is done inside."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._began


def _rolled(one: Conversation, place: str, rewards: tuple[float, ...], *, has_turns: bool) -> Rolled:
    tokens = {"rollout": np.array(one.logps, np.float32)}
    assert one.finish is not None, one.key
    return Rolled(
        key=one.key,
        place=place,
        prompt=np.array(one.request.prompt, np.int32),
        ids=np.array(one.ids, np.int32),
        versions=np.array(one.versions, np.int32),
        finish=one.finish,
        rewards=rewards,
        routes=one.routes,
        tokens=tokens | ({"mask": np.array(one.mask, np.float32)} if has_turns else {}),
    )
