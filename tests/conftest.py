"""Fixtures for the whole tree: one private Slurm for a test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megabatch.slurm.cluster import PrivateCluster, missing_programs


def _require_slurm() -> None:
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; on Debian: apt install slurm-wlm munge")


@pytest.fixture(autouse=True)
def _slurm_marked_tests_need_slurm(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slurm"):
        _require_slurm()


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    """Four nodes of 16 CPUs and 8 pretended GPUs, shared by the session; most tests want `slurm` instead."""
    _require_slurm()
    cluster = PrivateCluster.start(nodes=4, directory=tmp_path_factory.mktemp("slurm"), gpus_per_node=8)
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch) -> PrivateCluster:
    """The session's private Slurm, with this process's environment pointing at it."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster
