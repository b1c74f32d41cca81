"""HTTP to a server: what counts as a refusal, and what as a server that may answer the next time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from megabatch.errors import RolloutError
from megabatch.rollout.engine import LostError
from megabatch.rollout.vllm.client import Client, UnreachableError
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block

ANSWERS: dict[str, tuple[int, bytes]] = {
    "/good": (200, b'{"n": 1}'),
    "/empty": (200, b""),
    "/openai": (400, b'{"error": {"message": "too\\nlong", "type": "x"}}'),
    "/fastapi": (404, b'{"detail": "Not Found"}'),
    "/plain": (409, b"already\n begun"),
    "/broken": (500, b'{"error": "boom"}'),
    "/health": (200, b""),
    "/weight_info": (200, b'{"weight_version": "trainer:1"}'),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, text = ANSWERS[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps({"body": body, "token": self.headers["Authorization"]}).encode()
        self.send_response(200)
        # one byte more than is sent: the connection breaks in the middle of the answer
        self.send_header("Content-Length", str(len(text) + (self.path == "/cut")))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_answers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    client = Client(url + "/", token="t")
    assert client.get("/good") == {"n": 1}
    assert client.get("/empty") is None
    assert client.post("/any", {"a": [1]}) == {"body": {"a": [1]}, "token": "Bearer t"}
    assert Client(url).post("/any") == {"body": {}, "token": None}


@pytest.mark.parametrize(
    ("path", "words"),
    [("/openai", "answered 400: too long"), ("/fastapi", "answered 404: Not Found"),
     ("/plain", "answered 409: already begun")],
)  # fmt: skip
def test_refusals_say_what_the_server_said(path: str, words: str, url: str) -> None:
    with pytest.raises(RolloutError, match=words) as refused:
        Client(url).get(path)
    assert not isinstance(refused.value, UnreachableError)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>hello</html>", "answered with no JSON, as no vLLM server does: b'<html>hello</html>'"),
        (b"", "is no vLLM server: to /v1/models it answered 'None'"),
        (b"[]", "is no vLLM server"),
        (b'{"status": "ok"}', "is no vLLM server"),
        (b'{"data": [{"id": "llama3"}]}', "it does not say how many tokens llama3 takes"),
        (b'{"data": [{"id": "other", "max_model_len": 64}]}', "serves other and not 'policy'"),
    ],
)
def test_an_address_of_something_else_is_named(
    answer: bytes, said: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, "/v1/models", (200, answer))
    server = Server(Client(url), owner="trainer", device=torch.device("cpu"))
    with pytest.raises(RolloutError) as refused:
        server.facts()
    assert url in str(refused.value) and said in str(refused.value)
    server.close()


def test_a_failing_server_may_be_asked_again(url: str) -> None:
    with pytest.raises(UnreachableError, match="answered 500: boom"):
        Client(url).get("/broken")
    with pytest.raises(UnreachableError, match="did not answer"):
        Client(url).post("/cut")
    with pytest.raises(UnreachableError, match=r"did not answer: .*refused"):
        Client("http://127.0.0.1:1").get("/health")


def test_a_server_that_dropped_its_weights_has_no_base_for_an_adapter(url: str) -> None:
    """Else the next update would send the adapter alone, which the server would compute beside nothing."""
    server = Server(Client(url), owner="trainer", device=torch.device("cpu"))
    for level, is_there in ((1, True), (2, False)):
        server._version, server._has_base = 1, True
        server.sleep(level)
        assert (server.has_base, server.version is not None) == (is_there, is_there)
    server.close()


def test_servers_that_are_gone_are_waited_for_once() -> None:
    """A `LostError` would begin the update again, and each wait takes `rollout.vllm_server_timeout`."""

    def gone() -> Server:
        return Server(
            Client(f"http://127.0.0.1:{free_port_block()}"), owner="test", device=torch.device("cpu"), timeout_s=0.0
        )

    pool = Pool([gone(), gone()])
    pool._used = list(pool._servers)
    with pytest.raises(RolloutError, match="did not answer for 0 s") as raised:
        pool.wake()
    assert not isinstance(raised.value, LostError)
    pool._used = pool._servers[:1]  # the other may be back: the update finds out
    with pytest.raises(LostError):
        pool.wake()
