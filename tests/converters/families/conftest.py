"""The models of `cases.CASES`, saved by transformers itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Each case in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved(case)`: a folder with the case's random model, made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            _save(CASES[name], folders[name])
        return folders[name]

    return make


def _save(case: Case, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{case.prefix}Config")(**case.settings)
    model = getattr(transformers, f"{case.prefix}{case.head}")(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)
