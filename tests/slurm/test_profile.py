from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.errors import ConfigError
from megabatch.slurm.profile import ClusterProfile, Container, load_profile

FULL = """
partition = "gpu"
modules = ["cuda/12.8", "nccl"]
network = "efa"
inherit = ["HF_TOKEN"]

[container]
image = "train.sqsh"
mounts = ["/data"]

[environment]
NCCL_DEBUG = "INFO"

[sbatch]
exclusive = true
nice = 10
"""

FAULTY = """
partitoin = "x"
time = 5
network = "token ring"
modules = "cuda"
environment = {A = 1}

[container]
mount = []
"""


def test_a_profile_is_read_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "megabatch" / "clusters" / "here.toml"
    path.parent.mkdir(parents=True)
    path.write_text(FULL)
    expected = ClusterProfile(
        partition="gpu",
        modules=("cuda/12.8", "nccl"),
        network="efa",
        inherit=("HF_TOKEN",),
        container=Container(image="train.sqsh", mounts=("/data",)),
        environment={"NCCL_DEBUG": "INFO"},
        sbatch={"exclusive": True, "nice": 10},
    )
    assert load_profile("here") == load_profile(str(path)) == expected
    with pytest.raises(ConfigError, match=r"--cluster='there': no such file .*there\.toml; clusters there: here"):
        load_profile("there")


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(FAULTY)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    text = str(caught.value)
    assert "7 faults" in text
    for part in (
        "cluster.partitoin is unknown; try partition",
        "cluster.time=5 must be a string",
        "cluster.network='token ring' is not a choice",
        "cluster.modules='cuda' must be a list",
        "cluster.environment={'A': 1} must be a table of str values",
        "cluster.container.mount is unknown; try mounts",
        "cluster.container.image is required",
    ):
        assert part in text


def test_broken_toml_names_the_file_and_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("partition = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml.*line 1"):
        load_profile(str(path))


@pytest.mark.parametrize(
    "line",
    [
        'setup = ["export WANDB_API_KEY=hunter2"]',
        '[container]\nimage = "docker://me:hunter2@registry/x"',
        'srun = ["--export=ALL,HF_TOKEN=hunter2"]',
        'srun = ["--token", "hunter2"]',
        'setup = ["curl --password hunter2 https://host"]',
        '[environment]\nAZURE_STORAGE_KEY = "hunter2"',
        '[environment]\nHEADER = "Authorization: Bearer hunter2xyz"',
        '[environment]\nDATA = "https://me:hunter2@host"',
    ],
)
def test_a_secret_in_a_profile_is_refused_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "leaky.toml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"readable by others.*inherit") as caught:
        load_profile(str(path))
    assert "hunter2" not in str(caught.value)
