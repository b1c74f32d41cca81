"""Chains of small programs in place of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megabatch import Chain, Command, Resources, Step
from megabatch.chain.declare import Edge

SMALL = Resources(gpus_per_node=0, cpus_per_task=1, time="10")


def shell(name: str, script: str, after: Sequence[Edge] = (), outputs: Sequence[str] = ()) -> Step:
    """A step that runs bash."""
    return Step(name, Command(["bash", "-c", script], outputs=outputs, resources=SMALL), after=after)


def chain_of(folder: Path, *steps: Step) -> Chain:
    return Chain(name="demo", steps=steps, save=str(folder / "demo"))


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "caches"))
