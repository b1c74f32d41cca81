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
    with pytest.raises(ConfigError, match=r"others can read job scripts.*inherit") as caught:
        load_profile(str(path))
    assert "hunter2" not in str(caught.value)


def faults_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ('"x\\ntouch /tmp/hacked"', r"'cluster.sbatch.x\ntouch /tmp/hacked'"),
        ('"a b"', "cluster.sbatch.a b"),
        ('"x=$(id)"', "cluster.sbatch.x=$(id)"),
        ('"-wrap"', "cluster.sbatch.-wrap"),
        ('""', "cluster.sbatch."),
        ("mail_type", "cluster.sbatch.mail_type"),
    ],
)
def test_what_is_no_name_of_an_option_is_refused(tmp_path: Path, key: str, shown: str) -> None:
    said = faults_of(tmp_path, f'[sbatch]\n{key} = "1"\n')
    assert f"{shown} in" in said and "is not the name of an sbatch option" in said
    assert "\ntouch" not in said
    if key == "mail_type":
        assert "try mail-type" in said


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ('signal = "B:USR1@1"', "resources.signal_delay_s"),
        ("nodes = 3", "resources.nodes"),
        ("ntasks = 3", "resources.tasks_per_node"),
        ("ntasks-per-node = 3", "resources.tasks_per_node"),
        ("cpus-per-task = 3", "resources.cpus_per_task"),
        ('gpus = "8"', "resources.gpus_per_node"),
        ("gpus-per-task = 1", "resources.gpus_per_node"),
        ('gres = "gpu:h100:8"', "resources.gpus_per_node"),
        ('gres = "nvme:1,gpu:1"', "resources.gpus_per_node"),
        ('export = "NONE"', "`environment`"),
        ("requeue = false", "resources.requeue"),
        ("no-requeue = true", "resources.requeue"),
        ('output = "/dev/null"', "logs are in the run directory"),
        ('error = "/dev/null"', "logs are in the run directory"),
        ('open-mode = "truncate"', "logs are in the run directory"),
        ('array = "0-3"', "sweeps are arrays"),
        ('chdir = "/"', "where they are submitted"),
        ('wrap = "true"', "`setup`"),
        ('dependency = "singleton"', "a chain's `after`"),
        ('time = "5"', "`time` of the profile"),
        ('job-name = "x"', "resources.job_name"),
        ('depen = "singleton"', "a chain's `after`"),
        ('sign = "B:USR1@1"', "resources.signal_delay_s"),
        ("wait = true", "calling sbatch by hand"),
        ('distribution = "cyclic"', "ranks are placed on nodes in blocks"),
    ],
)
def test_what_the_script_depends_on_is_refused(tmp_path: Path, option: str, instead: str) -> None:
    said = faults_of(tmp_path, f"[sbatch]\n{option}\n")
    name = option.partition(" ")[0]
    assert f"cluster.sbatch.{name} in" in said and "is reserved for the job script; set " in said
    assert instead in said


def test_a_profile_may_set_all_else_once(tmp_path: Path) -> None:
    free = """
        account = "a"
        qos = "q"
        reservation = "r"
        constraint = "h100&ib"
        exclude = "n[1-3]"
        exclusive = true
        mail-type = "END"
        mail-user = "me@host"
        comment = "text"
        licenses = "matlab:1"
        switches = "1@1:00"
        nodelist = "n4"
        begin = "now+1hour"
        hold = true
        nice = 10
        gres = "nvme:1"
        gres-flags = "enforce-binding"
        distribution = "block:cyclic"
        mem = "100G"
        mem-per-gpu = "10G"
        hint = "nomultithread"
        time-min = "10"
        wait-all-nodes = 1
        gpu-bind = "closest"
    """
    path = tmp_path / "free.toml"
    path.write_text(f"[sbatch]\n{free}")
    assert len(load_profile(str(path)).sbatch) == len(free.split("\n")) - 2
    assert "cluster.sbatch.account in" in faults_of(tmp_path, 'account = "b"\n[sbatch]\naccount = "a"\n')
