"""A teacher behind a vLLM server: the tokens that it finds most likely at each position of given token ids.

The server is any of vLLM's OpenAI-compatible ones that serves one model, with `--max-logprobs` as large as the number
of tokens asked for. Its log-probabilities are those of its logits, before any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from megabatch.errors import RolloutError
from megabatch.rollout.vllm.client import Client, UnreachableError

T = TypeVar("T")
Likeliest = tuple[np.ndarray, np.ndarray]
"""ids int32 and natural log-probabilities float32, [n, K], in falling order: row t is of the token behind token t. The
last row, behind the last token, is 0."""


class TeacherServer:
    """Raises everywhere: UnreachableError when the server is gone for `timeout_s`, RolloutError when it refuses."""

    def __init__(self, client: Client, *, count: int, vocab_size: int, timeout_s: float, threads: int = 32) -> None:
        """Args: count: K; vocab_size: of the student; threads: requests sent at a time."""
        self._client, self._count, self._vocab_size, self._timeout_s = client, count, vocab_size, timeout_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="megabatch-teacher")
        self._model = ""

    def open(self, probes: Mapping[str, Sequence[int]], *, longest: int) -> None:
        """Waits for the server, and compares it with what the run needs.

        Args: probes: texts with the student's tokens of them; longest: tokens of the run's longest sequence.
        Raises: RolloutError naming what does not fit: several models, another tokenizer, too short sequences.
        """
        url = self._client.url
        served = self._patiently(lambda: self._client.get("/v1/models"))["data"]
        if len(served) != 1:
            names = ", ".join(str(one["id"]) for one in served) or "nothing"
            raise RolloutError(f"gkd.teacher_model_server={url} must serve one model, and serves {names}")
        self._model, limit = served[0]["id"], served[0].get("max_model_len")
        if limit is not None and limit <= longest:
            raise RolloutError(
                f"gkd.teacher_model_server={url} takes {limit} tokens, and must take one more than the run's longest "
                f"sequence of {longest}; start it with --max-model-len {longest + 1}, or lower data.max_length"
            )
        for text, ids in probes.items():
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            found = self._patiently(lambda body=body: self._client.post("/tokenize", body))["tokens"]  # type: ignore[misc]
            if list(found) != list(ids):
                raise RolloutError(
                    f"gkd.teacher_model_server={url}: {self._model} has another tokenizer than the student: "
                    f"{text[:40]!r} is {found[:8]} there and {list(ids)[:8]} here; distillation compares tokens by "
                    "their ids"
                )
        self.likeliest([(0, 0)])  # whether the server gives so many log-probabilities

    def likeliest(self, sequences: Sequence[Sequence[int]]) -> list[Likeliest]:
        return list(self._threads.map(self._of_one, sequences))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _of_one(self, ids: Sequence[int]) -> Likeliest:
        body = {"model": self._model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0,
                "prompt_logprobs": self._count}  # fmt: skip
        answer = self._patiently(lambda: self._client.post("/v1/completions", body))
        found = answer["choices"][0].get("prompt_logprobs")
        if found is None or len(found) != len(ids):
            raise RolloutError(f"gkd.teacher_model_server={self._client.url} answered without prompt_logprobs")
        shape = (len(ids), self._count)
        ids_nK: np.ndarray = np.zeros(shape, np.int32)
        logps_nK: np.ndarray = np.zeros(shape, np.float32)
        for place, at in enumerate(found[1:]):  # the first token follows nothing
            ids_nK[place], logps_nK[place] = self._best(at)
        return ids_nK, logps_nK

    def _best(self, at: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], list[float]]:
        """The K best of a position, of which the server may give one more: the token that follows."""
        best = sorted(at.items(), key=lambda one: (one[1]["rank"], int(one[0])))[: self._count]
        ids, logps = [int(token) for token, _ in best], [float(one["logprob"]) for _, one in best]
        if len(ids) < self._count or max(ids) >= self._vocab_size:
            raise RolloutError(
                f"gkd.teacher_model_server={self._client.url} names {len(ids)} tokens up to {max(ids, default=-1)}, "
                f"and needs gkd_logits_topk={self._count} of the student's {self._vocab_size:,}"
            )
        return ids, logps

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Asks again while the server does not answer, for `timeout_s` in all."""
        deadline, pause = time.monotonic() + self._timeout_s, 0.5
        while True:
            try:
                return ask()
            except UnreachableError:
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
