"""Adapters that peft made, each once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_adapters import CASES, GPT_OSS, PARAMETERS, Made, make


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Each case in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made(case)`: a base model and an adapter on disk, and what peft makes of them."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = make({**CASES, **PARAMETERS, "gpt-oss": GPT_OSS}[name], tmp_path_factory.mktemp(name))
        return known[name]

    return get
