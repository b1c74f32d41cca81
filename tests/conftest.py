"""Fixtures for the whole tree: one private Slurm for a test session, one small tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megabatch.slurm.cluster import PrivateCluster, missing_programs

_TEXTS = [
    "What is two plus two? The answer is four.",
    "How many apples are in the basket? There are seven apples in it.",
    "user assistant system You are a helpful assistant. think about the question, then answer it.",
] * 4


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megabatch")
    group.addoption("--faults", type=int, help="faults in a row in tests/end_to_end/test_faults.py (default: a few)")
    group.addoption("--faults_seed", type=int, default=0, help="seed of their kinds, times and victims")
    group.addoption("--kills", type=int, help="kills in tests/trainer/checkpoints/test_kills.py (default: a few)")
    group.addoption("--kills_seed", type=int, default=0, help="seed of their moments and victims")


def _require_slurm() -> None:
    missing = missing_programs()
    if missing:
        pytest.skip(f"{_NO_SLURM}: {', '.join(missing)} missing; on Debian: apt install slurm-wlm munge")


_NO_SLURM = "no Slurm here"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Gives all tests that want Slurm in vain one place, so that pytest's summary folds them into one line."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and _NO_SLURM in report.longrepr[2]:
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report


@pytest.fixture(autouse=True)
def _slurm_marked_tests_need_slurm(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slurm"):
        _require_slurm()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer, trained on the spot."""
    from megabatch.data.tokens import tokenizer

    return tokenizer.train_bpe(_TEXTS, vocab_size=400, out_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def bpe(tokenizer_folder: Path) -> Any:
    from megabatch.data.tokens import tokenizer

    return tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    """Four nodes of 16 CPUs and 8 pretended GPUs, shared by the session; most tests want `slurm` instead."""
    _require_slurm()
    cluster = PrivateCluster.start(
        nodes=4, directory=tmp_path_factory.mktemp("slurm"), gpus_per_node=8, gpu_type="a100"
    )
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch) -> PrivateCluster:
    """The session's private Slurm, with this process's environment pointing at it."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster
