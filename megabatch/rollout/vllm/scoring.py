"""Frozen models behind vLLM servers, which say how likely they find token ids that others wrote.

The servers are any of vLLM's OpenAI-compatible ones that serve one model. vLLM's log-probabilities of prompts are
those of its logits, whatever the temperature; servers of `megabatch rollout` divide the logits by the request's
(`tempering`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from megabatch.errors import RolloutError
from megabatch.rollout.shared_work import SharedWork
from megabatch.rollout.vllm.client import Client, UnreachableError

logger = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")
Likeliest = tuple[np.ndarray, np.ndarray]
"""ids int32 and natural log-probabilities float32, [n, K], in falling order: row t is of the token behind token t. The
last row, behind the last token, is 0."""
Text = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt, and those that follow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a run needs of servers."""

    vocab_size: int
    """Of the trained model."""
    longest: int
    """Tokens of the run's longest sequence."""
    likeliest: int = 0
    """K of `Likeliest`; 0 where it is not asked for."""
    temperature: float = 1.0
    """Divides the logits."""


class ScoringServer:
    """One server. Raises everywhere: UnreachableError when it is gone, RolloutError when it refuses."""

    def __init__(self, client: Client, name: str, wanted: Wanted, *, timeout_s: float) -> None:
        """Args: name: says where a recipe names it."""
        self._client, self.name, self._wanted, self.timeout_s = client, name, wanted, timeout_s

    def open(self, probes: Mapping[str, Sequence[int]]) -> int:
        """Waits for the server, and compares it with what the run needs.

        Args: probes: texts with the trained model's tokens of them.
        Returns: the tokens of the longest sequence that it takes.
        Raises: RolloutError naming what does not fit: several models, another tokenizer, too short sequences, few
        log-probabilities, or always those of temperature 1.
        """
        served = self._patiently(self._client.models)
        if len(served) != 1:
            raise RolloutError(f"{self.name} must serve one model, and serves {', '.join(served) or 'nothing'}")
        ((model, most),) = served.items()
        limit, longest = int(most or 0), self._wanted.longest
        if limit <= longest:
            raise RolloutError(
                f"{self.name} takes {limit} tokens, and must take one more than the run's longest sequence of "
                f"{longest}; start it with --max-model-len {longest + 1}, or lower data.max_length"
            )
        for text, ids in probes.items():
            self._compare_tokens(text, ids, model)
        self._patiently(lambda: self._asked((0, 0), self._wanted.likeliest))  # whether it gives so many
        if self._wanted.temperature != 1.0:
            self._prove_temperature(next(iter(probes.values())))
        return limit - 1  # it draws one more token

    def _compare_tokens(self, text: str, ids: Sequence[int], model: str) -> None:
        body = {"prompt": text, "add_special_tokens": False}
        found = self._patiently(lambda: self._client.post("/tokenize", body))["tokens"]
        if list(found) != list(ids):
            raise RolloutError(
                f"{self.name}: {model} has another tokenizer than the trained model: {text[:40]!r} is "
                f"{found[:8]} there and {list(ids)[:8]} here; models are compared token by token, by their ids"
            )

    def _prove_temperature(self, ids: Sequence[int]) -> None:
        """The two likeliest tokens are nearer to each other at a higher temperature, by just that factor."""
        wanted = self._wanted.temperature
        warm, plain = (
            sum(best - second for best, second in _gaps(self._asked(ids, 2, temperature=t))) for t in (wanted, 1.0)
        )
        if not warm or abs(plain / warm - wanted) >= abs(plain / warm - 1.0):
            raise RolloutError(
                f"{self.name} gives log-probabilities of temperature 1, whatever is asked for, and the run has "
                f"rollout.temperature={wanted:g}; start it with `megabatch rollout`, or set rollout.temperature=1"
            )

    def likeliest(self, ids: Sequence[int]) -> Likeliest:
        """The K likeliest tokens behind each token, at temperature 1."""
        count = self._wanted.likeliest
        ids_nK: np.ndarray = np.zeros((len(ids), count), np.int32)
        logps_nK: np.ndarray = np.zeros((len(ids), count), np.float32)
        for place, at in enumerate(self._asked(ids, count)[1:]):  # the first token follows nothing
            ids_nK[place], logps_nK[place] = self._best(at)
        return ids_nK, logps_nK

    def logps(self, text: Text) -> np.ndarray:
        """The log-probability of each token that follows a prompt, at the run's temperature: float32."""
        prompt, ids = text
        found = self._asked([*prompt, *ids], 0, temperature=self._wanted.temperature)[len(prompt) :]
        return np.array([at[str(token)]["logprob"] for token, at in zip(ids, found, strict=True)], np.float32)

    def comes_back(self, is_over_within: Callable[[float], bool], *, since: float) -> bool:
        """Whether it answers again within `timeout_s`, or is no longer needed.

        Args: is_over_within: waits so many seconds for that; since: when it failed first (`time.monotonic`).
        """
        pause = 0.5
        while time.monotonic() + pause < since + self.timeout_s:
            if is_over_within(pause):
                return True
            with suppress(UnreachableError):
                self._client.get("/health", timeout_s=10)
                return True
            pause = min(2 * pause, 10.0)
        return False

    def _asked(self, ids: Sequence[int], count: int, *, temperature: float = 1.0) -> list[Mapping[str, Any]]:
        """Of each token: itself and the `count` likeliest in its place, by id; the first one's is None."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": temperature, "seed": 0,
                "prompt_logprobs": count}  # fmt: skip
        answer = self._client.post("/v1/completions", body)
        found: list[Mapping[str, Any]] | None = answer["choices"][0].get("prompt_logprobs")
        if found is None or len(found) != len(ids):
            raise RolloutError(f"{self.name} answered without prompt_logprobs")
        return found

    def _best(self, at: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], list[float]]:
        """The K best of a position, of which the server may give one more: the token that follows."""
        count, vocab_size = self._wanted.likeliest, self._wanted.vocab_size
        best = sorted(at.items(), key=lambda one: (one[1]["rank"], int(one[0])))[:count]
        ids, logps = [int(token) for token, _ in best], [float(one["logprob"]) for _, one in best]
        if len(ids) < count or max(ids) >= vocab_size:
            raise RolloutError(
                f"{self.name} names {len(ids)} tokens up to {max(ids, default=-1)}, and needs "
                f"gkd_logits_topk={count} of the student's {vocab_size:,}"
            )
        return ids, logps

    def gone(self, error: UnreachableError) -> UnreachableError:
        return UnreachableError(f"{self.name} did not answer for {self.timeout_s:g} s, at last: {error}")

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Asks again while the server does not answer, for `timeout_s` in all."""
        deadline, pause = time.monotonic() + self.timeout_s, 0.5
        while True:
            try:
                return ask()
            except UnreachableError as e:
                if time.monotonic() + pause > deadline:
                    raise self.gone(e) from e
                time.sleep(pause)
                pause = min(2 * pause, 10.0)


def _gaps(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """The log-probabilities of the two likeliest tokens in each place but the first."""
    for at in found[1:]:
        best, second, *_ = sorted(at.values(), key=lambda one: int(one["rank"]))
        yield float(best["logprob"]), float(second["logprob"])


class ScoringServers:
    """Servers with the same model, which share what they are asked. Raises: as `ScoringServer`, once none is left."""

    def __init__(self, servers: Sequence[ScoringServer], *, each: int = 32) -> None:
        """Args: each: requests of this process that a server has at a time."""
        self._servers, self._each = servers, each
        self._left_out: set[str] = set()
        """Names of those that are gone, since what was asked last."""
        self._threads = ThreadPoolExecutor(len(servers) * each, thread_name_prefix="megabatch-scoring")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="megabatch-scores")

    def open(self, probes: Mapping[str, Sequence[int]]) -> int:
        """As of each: the tokens of the longest sequence that all of them take."""
        return min(server.open(probes) for server in self._servers)

    def likeliest(self, sequences: Sequence[Sequence[int]]) -> list[Likeliest]:
        return self._shared(ScoringServer.likeliest, sequences)

    def begin_logps(self, texts: Sequence[Text]) -> Future[list[np.ndarray]]:
        """Of each text what `ScoringServer.logps` gives, while the caller does something else."""
        return self._ahead.submit(self._shared, ScoringServer.logps, texts)

    def close(self) -> None:
        for threads in (self._threads, self._ahead):
            threads.shutdown(wait=False, cancel_futures=True)

    def _shared(self, ask: Callable[[ScoringServer, S], T], some: Sequence[S]) -> list[T]:
        """Each server takes the next whenever it has answered one."""
        work: SharedWork[S, T] = SharedWork(some)
        self._left_out.clear()
        takers = [
            self._threads.submit(self._serve, server, ask, work)
            for server in self._servers
            for _ in range(min(self._each, len(some)))
        ]
        errors = [error for one in takers if (error := one.result()) is not None]
        if not work.is_done:
            raise errors[-1]
        return work.results

    def _serve(
        self, server: ScoringServer, ask: Callable[[ScoringServer, S], T], work: SharedWork[S, T]
    ) -> UnreachableError | None:
        """Why it ended before the work was done."""
        while (piece := work.take()) is not None:
            try:
                work.done(piece, ask(server, piece.item))
            except UnreachableError as e:
                since = time.monotonic() if piece.failing_since is None else piece.failing_since
                work.put_back(replace(piece, failing_since=since))
                if not server.comes_back(work.is_over_within, since=since):
                    self._leave_out(server, e)
                    return server.gone(e)
            except BaseException:
                work.end()
                raise
        return None

    def _leave_out(self, server: ScoringServer, error: UnreachableError) -> None:
        """Says so once, of all the requests that it leaves."""
        if server.name not in self._left_out:
            self._left_out.add(server.name)
            logger.warning("%s is left out: %s", server.name, error)
