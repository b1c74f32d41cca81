"""The code reward: the share of a row's tests that the program in a completion passes, run in a sandbox."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from megabatch.errors import RewardError
from megabatch.rewards.sample import Place, RewardSample, Score
from megabatch.rewards.sandbox import lacking, run
from megabatch.values import dataclass

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Rows have `tests`, statements such as `assert f(1) == 2`, or `input_output`, an object with lists `inputs` and
    `outputs` for standard input and output."""

    seconds: int
    memory_mib: int
    at_a_time: int = 4
    name: ClassVar[str] = "code"
    place: ClassVar[Place] = "alone"

    def open(self) -> Score:
        if missing := lacking():
            _log.warning("code: this machine cannot keep programs from %s", " and from ".join(missing))
        return self._score

    def _score(self, samples: Sequence[RewardSample]) -> list[float]:
        with ThreadPoolExecutor(self.at_a_time) as threads:
            return list(threads.map(self._one, samples))

    def _one(self, sample: RewardSample) -> float:
        asserts, pairs = _tests(sample)
        program = program_in(sample.completion)
        if program is None:
            return 0.0
        passed = sum(self._holds(program, test) for test in asserts)
        passed += sum(self._prints(program, given, wanted) for given, wanted in pairs)
        return passed / (len(asserts) + len(pairs))

    def _holds(self, program: str, test: str) -> bool:
        """A program that ends early, with whatever exit code, never gets to print the word."""
        word = secrets.token_hex(16)
        outcome = run(f"{program}\n\n{test}\n\nprint('\\n{word}')\n", seconds=self.seconds, memory_mib=self.memory_mib)
        return outcome.code == 0 and outcome.output.rstrip().endswith(word)

    def _prints(self, program: str, given: str, wanted: str) -> bool:
        """White space at the ends of lines, and empty lines at the end, do not count."""
        outcome = run(program, stdin=given, seconds=self.seconds, memory_mib=self.memory_mib)
        return outcome.code == 0 and _lines(outcome.output) == _lines(wanted)


def program_in(completion: str) -> str | None:
    """The last fenced block that is Python's or of no language; None without one."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else None


def _tests(sample: RewardSample) -> tuple[list[str], list[tuple[str, str]]]:
    """Raises: RewardError for a row without tests, or with tests of another form."""
    columns = sample.columns
    tests = columns.get("tests") or []
    asserts = [tests] if isinstance(tests, str) else [str(test) for test in tests]
    pairs = _pairs(sample, columns.get("input_output"))
    if not asserts and not pairs:
        has = ", ".join(sorted(k for k, v in columns.items() if v is not None)) or "no other columns"
        raise RewardError(
            f"code needs the column 'tests' or 'input_output', and the row of sample {sample.key} has {has}"
        )
    return asserts, pairs


def _pairs(sample: RewardSample, value: Any) -> list[tuple[str, str]]:
    if not value:
        return []
    try:
        found = json.loads(value) if isinstance(value, str) else value
        return [(str(given), str(wanted)) for given, wanted in zip(found["inputs"], found["outputs"], strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(
            f"code: 'input_output' of sample {sample.key} must be an object with lists 'inputs' and 'outputs' of one "
            f"length ({error})"
        ) from error


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
