"""A completion of the ledger, and how the completions of one optimizer step become bytes and back."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from itertools import groupby
from typing import Any, Literal

from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """The experts that each token of prompt and completion went to."""

    form: Literal["|u1", "<i2"]
    """Numbers of one byte, or of two with more than 256 experts."""
    shape: tuple[int, int, int]
    """Tokens, layers, experts of a token."""
    data: bytes

    def to_lists(self) -> list[list[list[int]]]:
        """[tokens][layers][experts of a token]."""
        tokens, layers, each = self.shape
        size = 1 if self.form == "|u1" else 2
        flat = struct.unpack(f"<{len(self.data) // size}{'B' if size == 1 else 'h'}", self.data)
        rows = [list(flat[first : first + each]) for first in range(0, len(flat), each)]
        return [rows[token * layers : (token + 1) * layers] for token in range(tokens)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One completion, as an optimizer step used it."""

    key: str
    """The rollout's: unique in a run, and the same in each step that uses the completion."""
    prompt: str
    """The rendered prompt, decoded."""
    completion: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    """Tokens of the completion; with several turns also those between the model's."""
    logps: Sequence[float]
    """The engine's log-probability of each token; kept as fp32. 0 for tokens that are not the model's."""
    versions: Sequence[int]
    """Version of the policy that drew each token."""
    mask: Sequence[int]
    """1 where a token is part of the loss."""
    finish: str
    rewards: Mapping[str, float | None]
    """By name, not weighted; None where there is none."""
    reward: float | None
    """The weighted sum."""
    advantage: float
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Further numbers of each token by name, such as the old policy's log-probabilities; kept as fp32."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further plain values of the step's choosing, such as the place of the row in the data."""
    routes: Routes | None = None
    """Where the step replayed them."""


def best_and_worst(records: Sequence[Record], each: int) -> list[Record]:
    """The `each` completions with the highest and the lowest rewards, best first; those without one are left out."""
    known = sorted((one for one in records if one.reward is not None), key=lambda one: -(one.reward or 0.0))
    return known if len(known) <= 2 * each else [*known[:each], *known[-each:]]


_PLAIN = ("key", "prompt", "completion", "finish", "rewards", "reward", "advantage", "extra")
_ARRAYS = {"prompt_ids": "I", "ids": "I", "logps": "f"}
_RUNS = ("versions", "mask")
"""Fields of long runs of equal numbers, kept as [value, length]."""
_LENGTH = struct.Struct("<Q")


def encode(records: Sequence[Record]) -> bytes:
    """Plain values as JSON, then the arrays, little-endian."""
    lines = []
    arrays = bytearray()
    for record in records:
        line = {name: getattr(record, name) for name in _PLAIN}
        line["reward"] = _or_none(record.reward)
        line["rewards"] = {name: _or_none(value) for name, value in record.rewards.items()}
        line |= {name: _runs(getattr(record, name)) for name in _RUNS}
        line["lengths"] = [len(getattr(record, name)) for name in _ARRAYS]
        line["columns"] = list(record.columns)
        lines.append(line)
        for name, kind in _ARRAYS.items():
            values = getattr(record, name)
            arrays += struct.pack(f"<{len(values)}{kind}", *values)
        for values in record.columns.values():
            arrays += struct.pack(f"<{len(record.ids)}f", *values)
        if record.routes is not None:
            line["routes"] = [record.routes.form, record.routes.shape, len(record.routes.data)]
            arrays += record.routes.data
    text = json.dumps(lines, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(text)) + text + arrays


def decode(content: bytes) -> Iterator[Record]:
    """The records of `encode`, by this version or one before; those with NaN rewards have None there."""
    (size,) = _LENGTH.unpack_from(content)
    place = _LENGTH.size + size
    for line in json.loads(content[_LENGTH.size : place].decode("utf-8", "surrogatepass")):
        values: dict[str, Any] = {name: line[name] for name in _PLAIN}
        values |= {name: _whole(line[name]) for name in _RUNS}
        for (name, kind), length in zip(_ARRAYS.items(), line["lengths"], strict=True):
            form = struct.Struct(f"<{length}{kind}")
            values[name] = form.unpack_from(content, place)
            place += form.size
        form, values["columns"] = struct.Struct(f"<{len(values['ids'])}f"), {}
        for name in line.get("columns", ()):
            values["columns"][name] = form.unpack_from(content, place)
            place += form.size
        if "routes" in line:
            kind, shape, length = line["routes"]
            values["routes"] = Routes(form=kind, shape=tuple(shape), data=content[place : place + length])
            place += length
        yield Record(**values)


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    return [(int(value), sum(1 for _ in run)) for value, run in groupby(values)]


def _whole(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(value for value, length in runs for _ in range(length))
