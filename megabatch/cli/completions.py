"""`megabatch completions`: what a run generated and what it was worth, from its ledger."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megabatch.cli.runs import one_run
from megabatch.errors import ConfigError, RewardError
from megabatch.insight.masking import Masker
from megabatch.ledger.reader import Reader
from megabatch.ledger.record import Record
from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

LONGEST = 600
"""Characters that a text is cut to, in the middle, without `--full`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Which completions, and how they are shown."""

    step: int | None = None
    """None: the newest; with `grep`, every step."""
    order: str | None = None
    """`worst`, `best`, or None for the order of the step."""
    grep: str | None = None
    """Regular expression that prompt or completion must contain."""
    number: int = 5
    full: bool = False
    as_json: bool = False
    check: bool = False


def show_completions(path: Path, asked: Asked) -> int:
    """Prints them. Exit code 1 if `check` finds completions absent, damaged or twice.

    Raises: LaunchError for no run, RewardError for no ledger or step, ConfigError for a broken expression.
    """
    reader = Reader(RunDirectory(one_run(path)).ledger)
    if asked.check:
        account = reader.account()
        print(account)
        return int(bool(account.absent or account.damaged or account.repeated))
    mask, shown = Masker(), 0
    for step, record in _found(reader, asked):
        if shown == asked.number:
            break
        shown += 1
        print(mask.text(_json(step, record) if asked.as_json else _text(step, record, asked)))
    if not shown:
        print(f"no completion has {asked.grep!r}" if asked.grep else "the step has no completions")
    elif not asked.as_json:
        print(f"ledger: steps {reader.steps[0]} to {reader.steps[-1]}")
    return 0


def _found(reader: Reader, asked: Asked) -> Iterator[tuple[int, Record]]:
    newest = reader.steps[-1:] if asked.step is None else (asked.step,)
    steps = reversed(reader.steps) if asked.grep and asked.step is None else newest
    matches = _matching(asked.grep)
    for step in steps:
        records = [record for record in _readable(reader, step, is_one_of_many=steps is not newest) if matches(record)]
        yield from ((step, record) for record in _ordered(records, asked.order))


def _readable(reader: Reader, step: int, *, is_one_of_many: bool) -> Sequence[Record]:
    """A step's completions; none of a damaged one where others are searched too, which is said."""
    try:
        return reader.records(step)
    except RewardError as error:
        if not is_one_of_many:
            raise
        print(f"{error}; it is left out", file=sys.stderr)
        return ()


def _matching(grep: str | None) -> Callable[[Record], bool]:
    if grep is None:
        return lambda record: True
    try:
        pattern = re.compile(grep)
    except re.error as error:
        raise ConfigError(f"--grep {grep!r} is no regular expression: {error}") from error
    return lambda record: bool(pattern.search(record.completion) or pattern.search(record.prompt))


def _ordered(records: list[Record], order: str | None) -> list[Record]:
    """By reward; those without one last."""
    if order is None:
        return records
    sign = 1 if order == "worst" else -1
    return sorted(records, key=lambda record: (record.reward is None, sign * (record.reward or 0.0)))


def _json(step: int, record: Record) -> str:
    """One line; the experts of each token as [tokens][layers][experts]."""
    routes = None if record.routes is None else record.routes.to_lists()
    return json.dumps({"step": step, **asdict(replace(record, routes=None)), "routes": routes})


def _text(step: int, record: Record, asked: Asked) -> str:
    rewards = ", ".join(f"{name} {_number(value)}" for name, value in record.rewards.items())
    versions = sorted(set(record.versions))
    policy = "-" if not versions else "-".join(map(str, dict.fromkeys((versions[0], versions[-1]))))
    head = (
        f"step {step}  {record.key}  reward {_number(record.reward)} ({rewards})  advantage {record.advantage:+.3f}  "
        f"{len(record.ids)} tokens, {sum(record.mask)} in the loss  {record.finish}  policy {policy}"
    )
    return "\n".join([
        head,
        *_indented("prompt: ", record.prompt, full=asked.full),
        *_indented("completion: ", record.completion, full=asked.full),
        "",
    ])  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.4g}"  # -0.0 + 0.0 is 0.0


def _indented(label: str, text: str, *, full: bool) -> list[str]:
    if not full and len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} […{len(text) - LONGEST} characters…] {text[-LONGEST // 2 :]}"
    lines = printable(text).split("\n")
    return [f"  {label}{lines[0]}", *(f"    {line}" for line in lines[1:])]


def printable(text: str) -> str:
    """Without characters that control a terminal: a model may write any."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
