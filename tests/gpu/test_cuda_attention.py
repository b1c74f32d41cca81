"""torch's variable-length flash attention on packed rows, against fp64 attention over each sequence alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cuda_runs import python_path

CASES = {
    "one_sequence": ((512,), 8, 8, 64),
    "grouped_queries": ((130, 1, 257, 64), 8, 2, 128),
    "many_short": ((7,) * 40, 4, 4, 64),
    "narrow_heads": ((33, 96), 4, 2, 8),
    "window": ((300, 17, 64), 4, 2, 64, 32),
}
"""Lengths; query heads, key/value heads, channels of a head, and if not all: how many earlier keys a query sees."""


@pytest.mark.parametrize("name", CASES)
def test_flash_attention_equals_fp64_to_the_precision_of_bf16(name: str) -> None:
    lengths, *sizes = CASES[name]
    script = Path(__file__).with_name("attention_errors.py")
    command = [sys.executable, "-W", "ignore", str(script), ",".join(map(str, lengths)), *map(str, sizes)]
    environment = {**os.environ, **python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["is_flash"], "the kernel was not used: torch.nn.attention.varlen with window_size is of torch 2.11"
    assert found["is_isolated"], "a sequence saw another one"
    assert found["keeps_groups"] or version("torch") < "2.13", "keys and values were repeated in memory"
    # one rounding to bf16 is 2**-9 of the value; inputs are exact, probabilities and outputs are rounded
    assert found["output"] < 5e-3
    assert max(found[tensor] for tensor in ("query", "key", "value", "chunk")) < 1e-2
