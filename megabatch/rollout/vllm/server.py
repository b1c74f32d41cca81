"""One vLLM server as a rollout engine: requests and control over HTTP, weights by a process group."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Adapter, Completion, LostError, Request, RolloutEngine, Scored
from megabatch.rollout.vllm.adapter import NAME as ADAPTER
from megabatch.rollout.vllm.client import Client, UnreachableError
from megabatch.rollout.vllm.command import MODEL
from megabatch.rollout.vllm.group import Group, meet, open_store
from megabatch.rollout.vllm.sampling import FINISH, sampling_values
from megabatch.rollout.vllm.stream import send, send_end

_VOID = "void"
"""Version of weights that are not whole."""
_LONGEST_UPDATE_S = 3600.0
"""Of a request that lasts as long as the buckets of an update come; each of them has the group's time limit."""
_PATIENCE = 2.0
"""How much longer workers wait for a bucket than the trainer for them, which may wait for another server meanwhile."""
_LAST_WORDS_S = 10.0
"""How long a server that left an update may take to say why."""


class StaleError(LostError):
    """The server has other weights than the trainer gave it: it was started again, or another trainer uses it."""


class GoneError(UnreachableError):
    """The server did not answer for as long as one is waited for: waiting again would take as long again."""


class Server:
    """Raises everywhere: UnreachableError when the server is gone, RolloutError when it refuses."""

    experts: Literal["per_expert", "fused"] = "per_expert"

    def __init__(
        self,
        client: Client,
        *,
        owner: str,
        device: torch.device,
        group_port: int | None = None,
        timeout_s: float = 240.0,
        concurrency: int = 64,
    ) -> None:
        """Args: owner: names this trainer in the server's version of the weights; device: that weights are sent from;
        group_port: where trainer and workers meet, None for a free port; concurrency: requests sent at a time."""
        self.client, self._owner, self._device = client, owner, device
        self._group_port, self._timeout_s = group_port, timeout_s
        self.concurrency = concurrency
        self._threads = ThreadPoolExecutor(concurrency + 1, thread_name_prefix="megabatch-rollout")
        self._group: Group | None = None
        self._version: int | None = None
        self._coming: int | None = None
        self._paused = False
        self._has_base = False
        self._taking: Future[Any] | None = None
        """The request by which the server takes the buckets of an update."""
        self._sending: Future[None] | None = None
        """Of the newest bucket."""
        self._adapter: Adapter | None = None
        """The one that the server computes with, or that is coming."""

    @property
    def has_base(self) -> bool:
        """Asks the server, which may have been started again. One that does not answer needs nothing now."""
        try:
            self.health()  # in seconds, where the next question would wait as long as for any answer
            return self._has_base and self._is_same()
        except UnreachableError:
            return True

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def url(self) -> str:
        return self.client.url

    def wait(self) -> None:
        """Until the server answers. Raises: GoneError after `timeout_s`."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                self.client.get("/health", timeout_s=10)
                return
            except UnreachableError as e:
                if time.monotonic() > deadline:
                    raise GoneError(
                        f"rollout server {self.url} did not answer for {self._timeout_s:g} s "
                        f"(rollout.vllm_server_timeout), at last: {e}"
                    ) from e
                time.sleep(0.5)

    def facts(self) -> dict[str, Any]:
        """vLLM's version, `max_model_len`, and facts of the model, see `worker.Extension`. Raises: RolloutError for a
        server that cannot take weights."""
        models = self.client.models()
        limit = models.get(MODEL)
        if limit is None:
            raise RolloutError(
                f"{self.url} serves {', '.join(models) or 'nothing'} and not {MODEL!r}; start it with "
                "`megabatch rollout`"
            )
        answer = self.client.post("/collective_rpc", {"method": "megabatch_facts"})
        version = self.client.get("/version")["version"]
        return {"vllm": version, "max_model_len": limit, **answer["results"][0]}

    def check_fresh(self) -> None:
        """Raises: StaleError if the server does not have the weights of `version`."""
        if self._version is None:
            raise StaleError(f"{self.url} has no weights of this run yet")
        found = self.client.get("/weight_info")["weight_version"]
        given = self._tag(self._version)
        if found != given:
            self._version, self._group = None, None
            raise StaleError(
                f"{self.url} has the weights {found!r}, and was given {given!r}: it was started again, or another run "
                "uses it"
            )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.check_fresh()
        found = list(self._threads.map(self.complete, requests))
        self.check_fresh()
        return found

    def complete(self, request: Request) -> Completion:
        """One completion; whether the weights were this run's is for the caller to check, before and after."""
        if self._version is None:
            raise StaleError(f"{self.url} has no weights of this run yet")
        sampling, version = request.sampling, self._version
        answer = self.client.post(
            "/v1/completions",
            {
                "model": self._model,
                "prompt": list(request.prompt),
                **sampling_values(request),
                "return_token_ids": True,
                "request_id": request.key,
            },
        )
        choice = answer["choices"][0]
        ids = tuple(choice["token_ids"])
        logps = tuple(choice["logprobs"]["token_logprobs"]) if ids else ()
        finish = FINISH.get(choice["finish_reason"])
        if finish is None or len(ids) != len(logps):
            raise RolloutError(
                f"{self.url} answered {request.key} with {len(ids)} tokens, {len(logps)} log-probabilities and "
                f"finish_reason={choice['finish_reason']!r}"
            )
        if finish == "length" and len(ids) < sampling.max_tokens:  # vLLM lowers max_tokens without a word
            raise RolloutError(
                f"{self.url} cut {request.key} after {len(ids)} of {sampling.max_tokens} tokens: with a prompt of "
                f"{len(request.prompt)} that is more than its max_model_len"
            )
        return Completion(key=request.key, ids=ids, logps=logps, versions=(version,) * len(ids), finish=finish)

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        self.check_fresh()
        return list(self._threads.map(self._score, sequences))

    def _score(self, sequence: Scored) -> tuple[float, ...]:
        prompt, completion = sequence
        body = {"model": self._model, "prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 1.0,
                "prompt_logprobs": 0, "seed": 0}  # fmt: skip
        found = self.client.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][len(prompt) :]
        return tuple(float(at[str(token)]["logprob"]) for token, at in zip(completion, found, strict=True))

    @property
    def _model(self) -> str:
        """What requests name."""
        return MODEL if self._adapter is None else ADAPTER

    def begin_update(self, version: int) -> None:
        self.wait()
        self._has_base, self._adapter = False, None
        self._begin(version)

    def begin_adapter(self, version: int, adapter: Adapter) -> None:
        self.wait()
        if not (self._has_base and self._is_same()):
            raise UnreachableError(f"{self.url} was started again, and has no weights below the adapter")
        self._adapter = adapter
        self._begin(version)

    def _begin(self, version: int) -> None:
        self._version, self._coming = None, version
        if self._group is None or not self._is_same():
            self._group = self._meet()
        self.client.post("/pause?mode=wait")
        self._paused = True
        self._start_update()
        self._taking = self._sending = None

    def put(self, bucket: Bucket) -> None:
        """Returns when the bucket before this one was sent."""
        self._send(send, bucket)

    def _send(self, what: Callable[..., None], *arguments: Any) -> None:
        assert self._group is not None, "begin_update comes before"
        self._sent()
        if self._taking is None:  # not before, while other servers may still be waited for: the group has a time limit
            body = {"update_info": {"is_adapter": self._adapter is not None}}
            self._taking = self._threads.submit(self.client.post, "/update_weights", body, timeout_s=_LONGEST_UPDATE_S)
        self._sending = self._threads.submit(what, self._group, *arguments)

    def _sent(self) -> None:
        """Waits for the newest bucket."""
        if self._sending is None or self._taking is None:
            return
        wait((self._sending, self._taking), return_when=FIRST_COMPLETED)
        if self._taking.done():
            raise self._left("it answered before all weights were sent")
        if (error := self._sending.exception()) is not None:
            raise self._left(str(error)) from error

    def _left(self, reason: str) -> RolloutError:
        """The server's own error, which says more than a broken connection."""
        assert self._taking is not None
        self._close_group()
        with suppress(TimeoutError):
            error = self._taking.exception(_LAST_WORDS_S)
            if isinstance(error, RolloutError) and not isinstance(error, UnreachableError):
                return error
            reason = str(error or reason)
        return UnreachableError(f"{self.url} left while weights were sent: {reason}")

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._sending = None, None

    def end_update(self) -> None:
        assert self._coming is not None, "begin_update comes before"
        tag, adapter = self._tag(self._coming), self._adapter
        self._send(send_end)
        assert self._taking is not None
        self._taking.result()
        self.client.post("/finish_weight_update", {"weight_version": tag if adapter is None else _VOID})
        if adapter is not None:
            arguments = {"rank": adapter.rank, "scale": adapter.scale}
            self.client.post("/collective_rpc", {"method": "megabatch_use_adapter", "kwargs": arguments})
            self.client.post("/update_weight_version", {"new_version": tag})
        self.resume()
        self._version, self._has_base = self._coming, True

    def abort_update(self) -> None:
        """Leaves a server that still answers in a state in which the next update can begin."""
        self._version, self._has_base = None, False
        if self._sending is not None:
            self._sending.exception()  # it uses the group, which the server waits in until the last one is gone
        self._close_group()
        for path, body in (("/finish_weight_update", {"weight_version": _VOID}), ("/resume", {})):
            try:
                self.client.post(path, body, timeout_s=10)
            except RolloutError:
                """It is gone, or had not begun; `begin_update` will see."""
        self._paused = False

    def differing(self, bucket: Bucket) -> list[str] | None:
        """vLLM keeps tensors in the form that its kernels want."""
        return None

    def members(self) -> list[RolloutEngine]:
        return [self]

    def pause(self) -> None:
        self.client.post("/pause?mode=wait")
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self.client.post("/resume")
        self._paused = False

    def sleep(self, level: int) -> None:
        if level:
            self.client.post(f"/sleep?level={level}")
            if level >= 2:
                self._version, self._has_base = None, False

    def wake(self, *, cache: bool = True) -> None:
        self.wait()
        if self.client.get("/is_sleeping")["is_sleeping"]:
            self.client.post("/wake_up")

    def abort(self, keys: Collection[str]) -> None:
        self.client.post("/abort_requests", {"request_ids": [f"cmpl-{key}-0" for key in keys]})

    def health(self) -> None:
        self.client.get("/health", timeout_s=10)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._group = None

    def _tag(self, version: int) -> str:
        return f"{self._owner}:{version}"

    def _start_update(self) -> None:
        """Also where a trainer that died has begun one: it is finished first; which fails if layers lack."""
        for _ in range(2):
            try:
                self.client.post("/start_weight_update")
                return
            except UnreachableError:
                with suppress(UnreachableError):
                    self.client.post("/finish_weight_update", {"weight_version": _VOID}, timeout_s=10)
        self.client.post("/start_weight_update")

    def _is_same(self) -> bool:
        """Whether the server is still the process that the group was made with."""
        return str(self.client.get("/weight_info")["weight_version"]).startswith(f"{self._owner}:")

    def _meet(self) -> Group:
        size = 1 + int(self.client.get("/get_world_size")["world_size"])
        store = open_store(port=self._group_port, timeout_s=self._timeout_s)
        info = {"address": _own_address(self.url), "port": store.port, "size": size,
                "timeout_s": _PATIENCE * self._timeout_s}  # fmt: skip
        asked = self._threads.submit(self.client.post, "/init_weight_transfer_engine", {"init_info": info})
        group = meet(
            store, size=size, device=self._device, timeout_s=self._timeout_s, failed=lambda: _raise_if_failed(asked)
        )
        asked.result()
        return group


def _raise_if_failed(asked: Future[Any]) -> None:
    if asked.done():
        asked.result()


def _own_address(url: str) -> str:
    """This machine's address as the server's machine sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])
