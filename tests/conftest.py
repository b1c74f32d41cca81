"""Fixtures for the whole tree: one private Slurm for a test session, ranks, one small tokenizer; who runs what."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megabatch.slurm.cluster import PrivateCluster, missing_programs

sys.path.insert(0, str(Path(__file__).parent / "trainer"))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes start from the code that is compiled once

if TYPE_CHECKING:
    from rank_server import RankServer
    from xdist.scheduler import LoadFileScheduling

TOGETHER = {
    "tests/rollout/vllm_servers/": "vLLM",
    "tests/trainer/sync/test_colocated.py": "vLLM",
    "tests/trainer/rl/test_colocated_runs.py": "vLLM",
    "tests/end_to_end/test_faults.py": "interruptions",
    "tests/end_to_end/test_interruptions.py": "interruptions",
    "tests/end_to_end/test_main_job.py": "interruptions",
}
"""Files, or folders, which share what takes long to start: one process runs those of a name."""
LONG = (
    *TOGETHER,
    "tests/bench/",
    "tests/trainer/rl/test_whole_runs_at_every_layout.py",
    "tests/rehearse/",
    "tests/trainer/aligned/test_objectives_in_fp64.py",
)
"""What begins first, so that no process is left alone with one of them at the end."""

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            names = (name for place, name in TOGETHER.items() if nodeid.startswith(place))
            return next(names, super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # in the order in which they were collected
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((n for n, place in enumerate(LONG) if item.nodeid.startswith(place)), len(LONG))
        )


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
def ranks() -> Iterator[RankServer]:
    """Runs functions on the ranks of small worlds; see trainer/rank_server.py."""
    from rank_server import RankServer

    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ranks_with_vllm() -> Iterator[RankServer]:
    """The same in the environment with vLLM."""
    from rank_server import RankServer
    from vllm_python import VLLM_MODULES, python

    server = RankServer(python=python(), imported=VLLM_MODULES)
    yield server
    server.close()


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
