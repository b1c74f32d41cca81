"""Skips all of this folder without a CUDA device, with one clear reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rank_server import RankServer

TRAINER = Path(__file__).parents[1] / "trainer"
ROOMS = ("", "rl", "sync", "tasks", "heads", "lora")
sys.path[:0] = [str(Path(__file__).parent), *(str(TRAINER / room) for room in ROOMS)]

NO_GPU = "no CUDA device here; docs/gpu.md says what these tests have yet to show"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if not mine:
        return
    import torch

    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankServer]:
    """Runs functions on ranks that each have a GPU."""
    from rank_server import RankServer

    server = RankServer(cuda=True)
    yield server
    server.close()


@pytest.fixture(scope="session")
def cpus() -> Iterator[RankServer]:
    """The same on ranks that have none: for the references."""
    from rank_server import RankServer

    server = RankServer()
    yield server
    server.close()
