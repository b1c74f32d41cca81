"""The judge, against a real HTTP server that answers, fails for a while, or says something else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megabatch.config.rewards import JUDGE_PROMPT
from megabatch.errors import ConfigError, RewardError
from megabatch.rewards.judge import Judge, filled
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import NoReward, RewardSample


class Server(ThreadingHTTPServer):
    """Scores an answer by its length / 10; the answer says what else happens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str | None, dict[str, Any]]] = []
        self.failed_once: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["Authorization"], body))
        said = body["messages"][0]["content"]
        if "flaky" in said and said not in self.server.failed_once:
            self.server.failed_once.add(said)
            return self._send(503, {})
        if "down" in said:
            return self._send(503, {})
        if "denied" in said:
            return self._send(401, {"error": "no such key"})
        answer = said.partition("ANSWER=")[2]
        text = "a fine answer" if "mute" in said else f"Score: 0.9? No.\nScore: {len(answer) / 10}"
        self._send(200, {"choices": [{"message": {"content": text}}]})

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def judge(server: Server, **settings: Any) -> Judge:
    return replace(
        Judge(
            base_url=f"http://127.0.0.1:{server.server_port}/v1/",
            model="critic",
            key_variable=None,
            prompt="{prompt} {level} ANSWER={completion}",
            timeout_s=30,
            tries=2,
            at_a_time=2,
            pause_s=0.01,
        ),
        **settings,
    )


def sample(text: str) -> RewardSample:
    return RewardSample(
        key=f"0/0/{text}", prompt=[{"role": "user", "content": "q"}], completion=text, ids=(), columns={"level": 3}
    )


def test_scores_come_from_the_last_line_that_has_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    score = judge(server, key_variable="MY_KEY").open()
    found = score([sample("ab"), sample("flaky"), sample("mute"), sample("down")])
    assert found[:2] == [0.2, 0.5], "a failure that passes is tried again"
    assert isinstance(found[2], NoReward) and "gave no score: 'a fine answer'" in found[2].reason
    assert isinstance(found[3], NoReward) and "did not answer in 2 tries, the last: 503" in found[3].reason
    key, body = next(request for request in server.requests if "ab" in str(request))
    assert key == "Bearer sesame" and body["model"] == "critic"
    assert body["messages"] == [{"role": "user", "content": "user: q 3 ANSWER=ab"}]


def test_failures_are_counted_and_the_rest_is_used(server: Server) -> None:
    with Rewards([judge(server)], weights=None, workers=1, timeout_s=60) as rewards:
        found = rewards.of([sample("abc"), sample("mute")])
    assert found.values[0] == (0.3,) and found.failures == {"judge": 1}


def test_a_request_that_can_never_work_ends_the_run(server: Server) -> None:
    with pytest.raises(RewardError, match=r"judge: http.*/v1/chat/completions answered 401 .*no such key"):
        judge(server).open()([sample("denied")])
    assert len(server.requests) == 1


def test_what_is_missing_is_said_at_the_start(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="judge_api_key_variable=MY_KEY is not set"):
        judge(server, key_variable="MY_KEY").open()
    with pytest.raises(ConfigError, match="this job has no role critic"):
        judge(server, base_url="role:critic").open()


def test_a_role_of_the_job_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABATCH_ROLE_CRITIC", f"http://127.0.0.1:{server.server_port},http://other:1")
    monkeypatch.setenv("MEGABATCH_ROLE_TOKEN", "token")
    assert judge(server, base_url="role:critic").open()([sample("abcd")]) == [0.4]
    assert server.requests[0][0] == "Bearer token"


def test_a_prompt_keeps_other_braces_and_names_unknown_columns() -> None:
    assert filled("{completion} {} { x } {level}", sample("a")) == "a {} { x } 3"
    assert "a" in filled(JUDGE_PROMPT, sample("a"))
    with pytest.raises(RewardError, match=r"judge_prompt has \{solution\}, and the row of sample 0/0/a has level"):
        filled("{solution}", sample("a"))
