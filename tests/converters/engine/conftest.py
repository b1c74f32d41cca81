"""One folder to convert."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_folders import MOE, make_folder


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts in several shards, 0.5 MB."""
    return make_folder(tmp_path_factory.mktemp("made") / "hf", MOE)
