"""HTTP to one vLLM server, with its token; the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from megabatch.errors import RolloutError
from megabatch.rollout.engine import LostError


class UnreachableError(LostError):
    """The server did not answer, or answered with an error of its own: another try may succeed."""


class Client:
    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 240.0) -> None:
        """Args: url: the server's address, as http://host:port; timeout_s: of one request."""
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        # servers run inside the cluster, where a proxy of the environment does not lead
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self._asked(urllib.request.Request(self.url + path, headers=self._headers), timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        data = json.dumps(body if body is not None else {}).encode()
        return self._asked(urllib.request.Request(self.url + path, data, self._headers, method="POST"), timeout_s)

    def models(self) -> dict[str, int | None]:
        """The served models, and how many tokens each takes; None for an adapter. Raises: RolloutError where the
        address is of something else than a vLLM server."""
        answer = self.get("/v1/models")
        try:
            found = {str(one["id"]): one.get("max_model_len") for one in answer["data"]}
        except (TypeError, KeyError, AttributeError) as e:
            raise RolloutError(f"{self.url} is no vLLM server: to /v1/models it answered {str(answer)[:80]!r}") from e
        if found and not any(isinstance(limit, int) for limit in found.values()):
            raise RolloutError(
                f"{self.url} is no vLLM server: it does not say how many tokens {', '.join(found)} takes"
            )
        return found

    def _asked(self, request: urllib.request.Request, timeout_s: float | None) -> Any:
        """The answer's JSON, None for an empty one. Raises: UnreachableError; RolloutError for a refused request."""
        try:
            with self._opener.open(request, timeout=timeout_s or self._timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as e:
            kind = UnreachableError if e.code >= 500 else RolloutError
            raise kind(f"{request.full_url} answered {e.code}: {_message(e)}") from e
        except (OSError, HTTPException) as e:  # also timeouts, and connections that break in the middle of an answer
            raise UnreachableError(f"{request.full_url} did not answer: {e}") from e
        try:
            return json.loads(text) if text else None
        except ValueError as e:
            raise RolloutError(
                f"{request.full_url} answered with no JSON, as no vLLM server does: {text[:80]!r}"
            ) from e


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in one line."""
    try:
        text = error.read().decode(errors="replace")
    except OSError:
        return str(error.reason)
    try:
        found = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:500]
    found = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
    return " ".join(str(found.get("message", found) if isinstance(found, dict) else found).split())[:500]
