from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rank_server import RankServer


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Runs functions on the ranks of small worlds; see rank_server.py."""
    server = RankServer()
    yield server
    server.close()
