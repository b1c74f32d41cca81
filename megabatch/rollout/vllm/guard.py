"""Middleware of vLLM's server: its own token protects generation alone, ours protects everything but `/health`."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

TOKEN = "MEGABATCH_ROLE_TOKEN"
"""Environment variable with the token that requests must carry; without it all are let through."""

App = Callable[[Any, Any, Any], Awaitable[None]]


class Guard:
    """ASGI middleware, named to vLLM by `--middleware`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._may(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": "the token is missing or wrong"}'})

    def _may(self, scope: Any) -> bool:
        if not self._token:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())
