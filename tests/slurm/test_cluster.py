"""The private Slurm itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.slurm.cluster import PrivateCluster, main
from megabatch.slurm.cluster_config import ClusterLayout, slurm_conf
from megabatch.slurm.processes import descendants, tagged_processes

from .conftest import until

ROOT = Path(__file__).parents[2]


def left_over(directory: Path) -> set[int]:
    tags = (f"MEGABATCH_PRIVATE_CLUSTER={directory}", f"SLURM_CONF={directory}/slurm.conf")
    alive = set().union(*(tagged_processes(tag) for tag in tags))
    return {pid for pid in alive if _state(pid) not in ("Z", "")}


def _state(pid: int) -> str:
    """Empty for one that has gone meanwhile."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.slurm
def test_up_and_down_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dir", str(tmp_path)]
    assert main(["up", "--nodes", "2", *words]) == 0
    assert f"export SLURM_CONF={tmp_path}/slurm.conf" in capsys.readouterr().out
    assert main(["up", *words]) == 1
    assert "already" in capsys.readouterr().err
    assert main(["status", *words]) == 0
    assert capsys.readouterr().out.split() == ["n1", "idle", "n2", "idle"]
    environment = os.environ | PrivateCluster.load(tmp_path).environment
    # also what a job started and what it sent to the background in a session of its own
    script = "setsid sleep 1000 & srun --ntasks=2 sleep 1000"
    subprocess.run(["sbatch", "--nodes=2", "--output=/dev/null", f"--wrap={script}"], env=environment, check=True)
    until(lambda: len(left_over(tmp_path)) > 8)
    assert main(["down", *words]) == 0
    assert not left_over(tmp_path)
    assert main(["down", *words]) == 1
    assert "no private cluster" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_killed_owner_takes_its_cluster_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from megabatch.slurm.cluster import PrivateCluster\n"
        "PrivateCluster.start(nodes=1, directory=Path(sys.argv[1])); print('up', flush=True); time.sleep(1000)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert len(left_over(tmp_path)) >= 3
        slurm = os.environ | PrivateCluster.load(tmp_path).environment
        script = f"touch {tmp_path}/there; trap '' TERM; srun sleep 1000"
        subprocess.run(["sbatch", "--output=/dev/null", f"--wrap={script}"], env=slurm, check=True)
        until((tmp_path / "there").exists, what="a job")
        owner.send_signal(signal.SIGKILL)
    until(lambda: not left_over(tmp_path), what="daemons and jobs to end")


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_it_runs_as_an_ordinary_user() -> None:
    directory = Path("/tmp") / f"megabatch-test-{os.getpid()}"
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    code = (
        "import os, subprocess, sys; from pathlib import Path; from megabatch.slurm.cluster import PrivateCluster\n"
        # the interpreter's own files may be readable by root alone: everything is imported by now
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "cluster = PrivateCluster.start(nodes=2, directory=Path(sys.argv[1]))\n"
        "environment = os.environ | cluster.environment\n"
        "print(subprocess.check_output(['srun', '-N2', 'id', '-u'], text=True, env=environment, cwd='/').split())\n"
        "cluster.stop()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        command = [sys.executable, "-c", code, str(directory)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout.strip() == "['65534', '65534']", done.stderr
        assert not left_over(directory)
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


@pytest.mark.slurm
def test_a_cluster_that_does_not_come_up_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "slurmd"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'this machine has no slurmd today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent), prepend=os.pathsep)
    with pytest.raises(LaunchError, match=r"did not start:\n(?s:.*)no slurmd today"):
        PrivateCluster.start(nodes=1, directory=tmp_path / "cluster")
    assert not left_over(tmp_path / "cluster")


def test_a_folder_that_slurms_configuration_cannot_hold_is_refused(tmp_path: Path) -> None:
    layout = ClusterLayout(
        directory=tmp_path / "a b",
        nodes=1,
        gpus_per_node=0,
        gpu_type=None,
        cpus_per_node=1,
        first_port=1,
        socket_directory=tmp_path,
    )
    with pytest.raises(LaunchError, match="plain"):
        slurm_conf(layout)


def test_missing_daemons_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabatch.slurm.cluster.program_path", lambda name: None)
    with pytest.raises(LaunchError, match=r"needs slurmctld, .*apt install"):
        PrivateCluster.start(nodes=1, directory=tmp_path)


def test_descendants_are_found_through_strange_names() -> None:
    with subprocess.Popen(["bash", "-c", "exec -a 'a) (b' sleep 100 & wait"]) as shell:
        try:
            until(lambda: len(descendants({shell.pid})) == 2)
        finally:
            for pid in descendants({shell.pid}):
                os.kill(pid, signal.SIGKILL)
