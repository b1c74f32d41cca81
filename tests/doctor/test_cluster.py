"""Cluster profiles, right and wrong, against a real Slurm."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megabatch.doctor.cluster import examine_cluster
from megabatch.doctor.finding import Finding
from megabatch.doctor.site import examine_site
from megabatch.slurm.cluster import PrivateCluster, missing_programs
from megabatch.slurm.profile import ClusterProfile, Container, PreparePartition

pytestmark = pytest.mark.slurm


def faults(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.needed}


@pytest.mark.usefixtures("slurm")
class TestAgainstSlurm:
    def test_a_profile_that_fits_has_no_fault(self) -> None:
        profile = ClusterProfile(
            partition="batch,urgent", exclude="n[3-4]", time="12:00:00", sbatch={"exclusive": True, "requeue": False}
        )
        findings = examine_cluster(profile)
        assert faults(findings) == {}
        found = {finding.name: finding.found for finding in findings}
        assert found["GPUs"] == "4 nodes with gpu:a100:8"
        assert found["exclude"] == "2 of 4 nodes excluded"
        assert "its NodeAddr 127.0.0.1 does" in found["node names"]
        assert found["MaxArraySize"].startswith("1001")
        assert found["PreemptMode"] == "REQUEUE, by preempt/partition_prio"
        assert found["requeue delay"].startswith("6 s")
        assert "sbatch requeue" not in found

    @pytest.mark.parametrize("form", ["gres", "gpus-per-node", "gpus-per-task"])
    def test_how_gpus_are_asked_for_is_tried(self, form: Any) -> None:
        findings = examine_cluster(ClusterProfile(gpu_request=form, gpu_type="a100"))
        assert faults(findings) == {}
        [found] = [finding.found for finding in findings if finding.name == "gpu_request"]
        assert f"--{form}=" in found and "a100:1" in found

    @pytest.mark.parametrize(
        ("words", "name", "found", "fix"),
        [
            ({"partition": "bacth"}, "partition", "no partition bacth", '"batch"'),
            ({"exclude": "n1,zz9"}, "exclude", "no such node: zz9", "sinfo -N"),
            ({"constraint": "h100"}, "constraint", "h100: Invalid feature", "sinfo -o"),
            ({"gpu_type": "h100"}, "GPUs", "no node there has GPUs of type h100", 'gpu_type = "a100"'),
            ({"reservation": "mine"}, "reservation", "mine: Requested reservation is invalid", "scontrol show"),
            ({"sbatch": {"mail-type": "SOMETIMES"}}, "sbatch mail-type", "Invalid --mail-type", "man sbatch"),
            ({"sbatch": {"exclusive": True, "gpus_of_node": 8}}, "sbatch gpus_of_node", "unrecognized option", "man"),
        ],
    )
    def test_what_slurm_does_not_know_is_named_with_the_fix(
        self, words: dict[str, Any], name: str, found: str, fix: str
    ) -> None:
        [fault] = faults(examine_cluster(ClusterProfile(**words))).values()
        assert fault.name == name
        assert found in fault.found
        assert fix in fault.fix

    def test_where_preparations_go_is_looked_at_like_the_rest(self) -> None:
        good = PreparePartition(partition="urgent", time="2:00:00")
        findings = {finding.name: finding for finding in examine_cluster(ClusterProfile(prepare=good))}
        assert not any(finding.needed for finding in findings.values())
        assert findings["prepare.partition"].found.startswith("urgent: 4 nodes")
        assert findings["prepare.time"].found == "2:00:00 is within urgent's limit of UNLIMITED"
        bad = PreparePartition(partition="urgnet", constraint="bigmem")
        found = faults(examine_cluster(ClusterProfile(prepare=bad)))
        assert (found["prepare.partition"].found, found["prepare.partition"].fix) == (
            "no partition urgnet",
            'partition = "urgent"',
        )
        assert "bigmem" in found["prepare.constraint"].found

    def test_a_partition_that_is_down_or_too_short(self, slurm: PrivateCluster) -> None:
        def update(words: str) -> None:
            subprocess.run(["scontrol", "update", "PartitionName=urgent", *words.split()], check=True)

        update("State=DOWN MaxTime=60")
        try:
            found = faults(examine_cluster(ClusterProfile(partition="urgent", time="2:00:00")))
        finally:
            update("State=UP MaxTime=INFINITE")
        assert "urgent is DOWN" in found["partition"].found
        assert (found["time"].found, found["time"].supported) == ("2:00:00 is over urgent's limit", "01:00:00")

    def test_account_and_qos_mean_nothing_without_accounting(self) -> None:
        findings = {f.name: f for f in examine_cluster(ClusterProfile(account="nlp", qos="high"))}
        assert [findings[name].state for name in ("accounting", "account", "qos")] == ["missing"] * 3
        assert not any(finding.needed for finding in findings.values())

    def test_a_job_looks_from_a_node(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        profile = ClusterProfile(shared_cache=str(tmp_path), python=sys.executable, partition="urgent")
        assert faults(examine_site(profile, run=True)) == {}
        assert not list(tmp_path.iterdir())
        bad = ClusterProfile(shared_cache=str(tmp_path), python="/no/python", local_cache="/no/folder $(x)")
        assert set(faults(examine_site(bad, run=True))) == {"local_cache /no/folder $(x)", "python /no/python"}
        refused = faults(examine_site(ClusterProfile(partition="nope", shared_cache=str(tmp_path)), run=True))
        assert "nope" in refused["job on a node"].found

    def test_the_command(self, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
        good.write_text('partition = "batch"\n')
        bad.write_text('partition = "bacth"\n')

        def doctor(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "megabatch.cli", "doctor", "--cluster", str(path), *words]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        done = doctor(good, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["ok"]
        done = doctor(bad)
        assert done.returncode == 1
        assert 'fix: partition = "batch"' in done.stdout
        assert doctor(tmp_path / "none.toml").returncode == 2


def test_a_controller_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    [fault] = examine_cluster(ClusterProfile(partition="x"))
    assert fault.needed and "No such file" in fault.found and "SLURM_CONF" in fault.fix


def test_containers_modules_folders_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    profile = ClusterProfile(
        container=Container(image="/no/such.sqsh"),
        modules=("no-such-module/1",),
        shared_cache=str(tmp_path / "missing"),
        inherit=("HF_TOKEN", "WANDB_API_KEY"),
    )
    findings = {finding.name: finding for finding in examine_site(profile, run=False)}
    assert set(faults(list(findings.values()))) == {"container (pyxis)", "image", "modules", "shared_cache"}
    assert "HF_TOKEN" not in findings and findings["WANDB_API_KEY"].fix == "export WANDB_API_KEY"
    assert "command not found" in findings["modules"].found or "no-such-module/1" in findings["modules"].found


def test_accounts_are_those_of_this_user(accounted: PrivateCluster) -> None:
    environment = os.environ | accounted.environment
    for words in ("account nlp", f"user {getpass.getuser()} account=nlp"):
        command = ["sacctmgr", "--immediate", "add", *words.split()]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in accounted.environment.items():
            patch.setenv(name, value)
        assert faults(examine_cluster(ClusterProfile(account="nlp", qos="normal"))) == {}
        other = PreparePartition(partition="batch", account="ndp", qos="low")
        findings = examine_cluster(ClusterProfile(account="npl", qos="high", prepare=other))
    found = faults(findings)
    assert '"nlp"' in found["account"].fix
    assert found["qos"].fix == 'qos = "normal"'
    assert '"nlp"' in found["prepare.account"].fix
    assert found["prepare.qos"].found.endswith("may not use low")


@pytest.fixture
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    missing = missing_programs(accounting=True)
    if missing:
        pytest.skip(
            f"no accounting here: {', '.join(missing)} missing; on Debian: apt install slurmdbd mariadb-server"
        )
    cluster = PrivateCluster.start(nodes=1, directory=tmp_path_factory.mktemp("accounts"), accounting=True)
    yield cluster
    cluster.stop()
