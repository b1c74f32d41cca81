"""What megatron-core need not import, it does not, and a user's code in a rank still can."""

from __future__ import annotations

import importlib
import sys

import pytest
from rank_server import RankServer


def imported() -> tuple[bool, str]:
    """Whether wandb came with the trainer; the name of what a rank gets that imports it."""
    came = "wandb" in sys.modules
    return came, importlib.import_module("wandb").__name__


def test_ranks_start_without_trackers_and_may_import_it(ranks: RankServer) -> None:
    pytest.importorskip("wandb")
    assert ranks.run(imported, world_size=1) == [(False, "wandb")]
