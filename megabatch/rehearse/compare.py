"""Compares two runs bit for bit and finds their first difference."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from megabatch.converters.safetensors_io import HfFolder
from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

COMPUTED = ("loss_sum", "loss_count", "grad_norm", "learning_rate", "tokens", "samples", "consumed_tokens")
EVALUATED = ("eval_loss_sum", "eval_loss_count")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison."""

    what: str
    difference: str | None
    """The first difference; None if all is equal."""


def compare(whole: RunDirectory, resumed: RunDirectory, *, steps: int) -> list[Verdict]:
    """Every step, every evaluation, and the weights after the last step."""
    return [
        Verdict(f"{steps} training steps: losses, gradient norms, tokens", _lines(whole, resumed, "train", COMPUTED)),
        Verdict("evaluations", _lines(whole, resumed, "eval", EVALUATED)),
        Verdict(f"weights after step {steps}", _weights(whole, resumed, steps)),
    ]


def records(run: RunDirectory, kind: str) -> dict[int, Mapping[str, Any]]:
    """The lines of metrics.jsonl by step; the last line of a repeated step counts."""
    try:
        text = run.metrics.read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return {line["step"]: line for line in lines if line["kind"] == kind}


def _lines(whole: RunDirectory, resumed: RunDirectory, kind: str, names: tuple[str, ...]) -> str | None:
    expected, found = records(whole, kind), records(resumed, kind)
    for step in sorted(expected):
        if step not in found:
            return f"step {step} is missing"
        for name in names:
            a, b = expected[step][name], found[step][name]
            if _bits(a) != _bits(b):
                return f"first at step {step}: {name} {a!r} uninterrupted, {b!r} resumed"
    return None


def _bits(value: float) -> bytes:
    """Equal exactly for equal numbers, NaN included."""
    return struct.pack("<d", math.nan if math.isnan(value) else value)


def _weights(whole: RunDirectory, resumed: RunDirectory, step: int) -> str | None:
    expected, found = (HfFolder(run.step(step) / "hf") for run in (whole, resumed))
    for name in expected.names:
        a, b = expected.read(name), found.read(name)
        if (a.dtype, a.shape, bytes(a.data)) != (b.dtype, b.shape, bytes(b.data)):
            return f"first in {name}"
    return None
