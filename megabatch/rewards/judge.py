"""The judge reward: a score that a language model gives, over an endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from megabatch.errors import ConfigError, RewardError
from megabatch.rewards.sample import NoReward, Place, RewardSample, Score
from megabatch.values import dataclass

_SCORE = re.compile(r"score\W{0,4}\s*([-+]?\d*\.?\d+)", re.IGNORECASE)
_FIELD = re.compile(r"\{(\w+)\}")
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again."""
ROLE = "role:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """No reward for a sample whose reply has no `Score: N`, or that gets none after all tries."""

    base_url: str
    """Up to `/v1`; `role:NAME` is a server of the recipe's roles."""
    model: str
    key_variable: str | None
    prompt: str
    timeout_s: float
    tries: int
    at_a_time: int
    pause_s: float = 1.0
    """Before the second try; doubled before each further one."""
    name: ClassVar[str] = "judge"
    place: ClassVar[Place] = "alone"

    def open(self) -> Score:
        """Raises: ConfigError without the key or the role's address."""
        address, key = self._address(), self._key()

        def score(samples: Sequence[RewardSample]) -> list[Any]:
            with ThreadPoolExecutor(self.at_a_time) as threads:
                return list(threads.map(lambda sample: self._one(sample, address, key), samples))

        return score

    def _address(self) -> str:
        if not self.base_url.startswith(ROLE):
            return self.base_url.rstrip("/")
        name = self.base_url.removeprefix(ROLE)
        addresses = os.environ.get(f"MEGABATCH_ROLE_{name.upper()}")
        if not addresses:
            raise ConfigError(
                f"judge_base_url={self.base_url}: this job has no role {name}; add it to the recipe's roles"
            )
        return addresses.split(",")[0].rstrip("/") + "/v1"

    def _key(self) -> str | None:
        variable = "MEGABATCH_ROLE_TOKEN" if self.base_url.startswith(ROLE) else self.key_variable
        if variable is None:
            return None
        if not os.environ.get(variable):
            raise ConfigError(f"judge_api_key_variable={variable} is not set; export it in the submitting shell")
        return os.environ[variable]

    def _one(self, sample: RewardSample, address: str, key: str | None) -> Any:
        body = {"model": self.model, "messages": [{"role": "user", "content": filled(self.prompt, sample)}]}
        request = urllib.request.Request(
            f"{address}/chat/completions",
            data=json.dumps({**body, "temperature": 0}).encode(),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
        )
        reply = self._answer(request)
        if isinstance(reply, NoReward):
            return reply
        found = _SCORE.findall(reply)
        return float(found[-1]) if found else NoReward(f"the judge gave no score: {reply[-120:]!r}")

    def _answer(self, request: urllib.request.Request) -> str | NoReward:
        """Raises: RewardError for a status that no further try would change."""
        said = ""
        for number in range(self.tries):
            if number:
                time.sleep(self.pause_s * 2 ** (number - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else NoReward("the judge's reply is empty")
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}"
                if error.code not in _PASSING:
                    detail = error.read(200).decode("utf-8", "replace")
                    raise RewardError(f"judge: {request.full_url} answered {said}: {detail}") from error
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                said = f"{type(error).__name__}: {error}"
        return NoReward(f"the judge did not answer in {self.tries} tries, the last: {said}")


def fields_of(prompt: str) -> list[str]:
    """The columns that `judge_prompt` names."""
    return [name for name in _FIELD.findall(prompt) if name not in ("prompt", "completion")]


def filled(prompt: str, sample: RewardSample) -> str:
    """The prompt with `{prompt}`, `{completion}` and `{column}` replaced; other braces stay.

    Raises: RewardError for a name that the row does not have.
    """
    said = "\n\n".join(f"{message['role']}: {message['content']}" for message in sample.prompt)
    given = {name: value for name, value in sample.columns.items() if value is not None}
    values = {**given, "prompt": said, "completion": sample.completion}

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RewardError(
                f"judge_prompt has {match[0]}, and the row of sample {sample.key} has {', '.join(values)}"
            )
        return str(values[match[1]])

    return _FIELD.sub(value, prompt)
