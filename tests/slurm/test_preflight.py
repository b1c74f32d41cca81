"""The preflight step on a real Slurm. There is no GPU here: an executable of ours stands in for nvidia-smi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch.slurm.chain import ChainedJob, submit_all
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.control import resume, resume_in_links
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render

from .conftest import PAYLOAD, Submit, Submitted, until

pytestmark = pytest.mark.slurm

FAKE = Path(__file__).with_name("fake_nvidia_smi.py")
Nodes = Callable[..., None]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Puts nvidia-smi's stand-in on PATH; `nodes(n1={…})` says what it answers there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable} -S\n{FAKE.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(**found: dict[str, Any]) -> None:
        for name, words in found.items():
            (folder / f"{name}.json").write_text(json.dumps(words))

    return answer


def bad_nodes(job: Submitted) -> list[dict[str, Any]]:
    path = job.run.path / "bad_nodes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured(job: Submitted, attempt: int = 0) -> dict[str, Any]:
    [path] = job.run.logs.glob(f"preflight.*.{attempt}.json")
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def excluded(scontrol: Callable[..., str], job: Submitted) -> str:
    shown = scontrol("--oneliner", "show", "job", job.job_id)
    return shown.split(" ExcNodeList=")[1].split()[0]


def test_a_bad_node_is_left_out_and_the_job_runs_on_the_others(
    submit_payload: Submit, nodes: Nodes, scontrol: Callable[..., str]
) -> None:
    nodes(n1={"values": {"ecc.errors.uncorrected.volatile.total": "3"}})
    profile = ClusterProfile(exclude="n4", sbatch={"exclusive": True})
    job = submit_payload(profile=profile, nodes=2, gpus_per_node=2, preflight="light")
    end = job.wait()
    assert end.state is State.COMPLETED, job.batch_log()
    [bad] = bad_nodes(job)
    assert (bad["node"], bad["check"], bad["excluded"], bad["job_id"], bad["attempt"]) == (
        "n1",
        "ecc",
        True,
        job.job_id,
        0,
    )
    assert bad["value"] == "GPU 0: ecc.errors.uncorrected.volatile.total=3"
    assert excluded(scontrol, job) in ("n1,n4", "n[1,4]"), "the profile's own list stays"
    assert {rank["environment"]["SLURMD_NODENAME"] for r in range(2) for rank in job.said(r, 1)[:1]} == {"n2", "n3"}
    assert not job.said(0, 0), "no rank may start on a bad node"
    assert [(e.attempt, e.exit_code) for e in read_records(job.run)[0].endings] == [(0, 75), (1, 0)]
    assert not [path for path in job.run.logs.glob("preflight.*") if path.suffix != ".json"]
    again = Submitted(job.run, resume(job.run.path))
    assert excluded(scontrol, again) in ("n1,n4", "n[1,4]"), "a new job knows them, too"
    assert again.wait().state is State.COMPLETED
    assert "preflight" in again.batch_log() and "requeued without" not in again.batch_log()


def test_the_links_after_one_that_met_a_bad_node_do_without_it(
    slurm: PrivateCluster, payload_job: JobSpec, nodes: Nodes, scontrol: Callable[..., str]
) -> None:
    nodes(n1={"values": {"ecc.errors.uncorrected.volatile.total": "3"}})
    job = replace(payload_job, nodes=2, gpus_per_node=2, preflight="light", requeue=False, links=3)
    job = replace(job, arguments=(str(PAYLOAD), "until_attempt=2"))
    script = render(job, ClusterProfile(exclude="n4", sbatch={"exclusive": True}))
    [ids] = submit_all([ChainedJob(name="run", run=job.files, script=script, links=3)]).values()
    first, second, last = (Submitted(job.files, job_id) for job_id in ids)
    second.wait_listening(attempt=1, ranks=2)
    assert "the next job of this run starts without n1" in first.batch_log()
    assert {second.said(rank, 1)[0]["environment"]["SLURMD_NODENAME"] for rank in range(2)} == {"n2", "n3"}
    assert excluded(scontrol, last) in ("n1,n4", "n[1,4]"), "not the next link alone, and the profile's own list stays"
    assert second.now().job_id == second.job_id
    nodes(n2={"values": {"ecc.errors.uncorrected.volatile.total": "3"}})
    subprocess.run(["scancel", "--batch", "--signal=USR2", second.job_id], check=True)
    assert last.wait().state is State.FAILED
    assert "without n2 partition batch has only 1 nodes" in last.batch_log()
    endings = [(end.attempt, end.exit_code) for record in read_records(job.files) for end in record.endings]
    assert endings == [(0, 75), (1, 75), (2, 1)]


def test_the_last_link_says_how_to_go_on_without_a_bad_node(
    slurm: PrivateCluster, payload_job: JobSpec, nodes: Nodes
) -> None:
    nodes(n1={"values": {"ecc.errors.uncorrected.volatile.total": "3"}})
    job = replace(payload_job, nodes=2, gpus_per_node=2, preflight="light", requeue=False, links=2)
    job = replace(job, arguments=(str(PAYLOAD),))
    script = render(job, ClusterProfile(sbatch={"exclusive": True}))
    last = Submitted(job.files, submit_all([ChainedJob(name="run", run=job.files, script=script)])["run"][0])
    assert last.wait().state is State.FAILED
    assert (
        f"to continue without n1; queue some with: megabatch resume {job.run_directory} --chain N" in last.batch_log()
    )
    ids = resume_in_links(job.run_directory, 2)
    assert Submitted(job.files, ids[0]).wait().state is State.COMPLETED
    assert {last.said(rank, 1)[0]["environment"]["SLURMD_NODENAME"] for rank in range(2)} == {"n2", "n3"}


def test_all_checks_of_good_nodes(submit_payload: Submit) -> None:
    job = submit_payload(nodes=3, preflight="full")
    assert job.wait().state is State.COMPLETED, job.batch_log()
    assert "preflight of 3 nodes: ok" in job.batch_log()
    found = measured(job)
    assert sorted(report["node"] for report in found["reports"]) == ["n1", "n2", "n3"]
    assert all(report["matmul"][0]["tflops"] > 0 for report in found["reports"])
    pairs = [tuple(link["pair"]) for link in found["links"]]
    assert sorted(pairs) == sorted([(0, 1), (0, 2), (1, 2)] * 2), "both nodes of a pair report it"
    assert all(link["gb_per_s"] > 0 for link in found["links"])
    assert not bad_nodes(job)


def test_what_all_nodes_have_in_common_is_no_nodes_fault(submit_payload: Submit, nodes: Nodes) -> None:
    nodes(n1={"exit": 15}, n2={"exit": 15})
    job = submit_payload(
        profile=ClusterProfile(sbatch={"nodelist": "n[1-2]"}), nodes=2, gpus_per_node=2, preflight="light"
    )
    end = job.wait()
    assert (end.state, end.exit_code) == (State.FAILED, 1)
    log = job.batch_log()
    assert "2 of 2 nodes fail: that is the site's or the job's fault" in log
    assert "Unable to determine the device handle" in log
    assert not any(bad["excluded"] for bad in bad_nodes(job))


def test_a_job_that_could_not_run_without_the_bad_node_fails(submit_payload: Submit, nodes: Nodes) -> None:
    nodes(n2={"gpus": 1})
    job = submit_payload(nodes=4, gpus_per_node=2, preflight="light")
    assert job.wait().state is State.FAILED
    assert "without n2 partition batch has only 3 nodes" in job.batch_log()
    assert bad_nodes(job)[0]["value"] == "1 GPUs"


def test_a_first_node_that_cannot_even_start_is_left_out(submit_payload: Submit, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fails = '[[ "$*" = *preflight* && "$SLURMD_NODENAME" = n1 ]] && exit 3'
    broken.write_text(f'#!/bin/bash\n{fails}\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    profile = ClusterProfile(sbatch={"exclusive": True})
    job = submit_payload(profile=profile, python=str(broken), nodes=3, preflight="light", preflight_answer_s=10)
    assert job.wait().state is State.COMPLETED, job.batch_log()
    [bad] = bad_nodes(job)
    assert (bad["node"], bad["check"], bad["excluded"]) == ("n1", "answer", True)
    assert {job.said(rank, 1)[0]["environment"]["SLURMD_NODENAME"] for rank in range(3)} == {"n2", "n3", "n4"}


def test_a_node_that_does_not_report_is_left_out(submit_payload: Submit, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fails = '[[ "$*" = *preflight* && "$SLURMD_NODENAME" = n2 ]] && exit 3'
    broken.write_text(f'#!/bin/bash\n{fails}\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    profile = ClusterProfile(sbatch={"exclusive": True})
    job = submit_payload(profile=profile, python=str(broken), nodes=3, preflight="light", preflight_answer_s=10)
    assert job.wait().state is State.COMPLETED, job.batch_log()
    assert [(bad["node"], bad["check"], bad["excluded"]) for bad in bad_nodes(job)] == [("n2", "answer", True)]


def test_a_request_to_stop_during_the_preflight_is_not_lost(submit_payload: Submit, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    # the preflight goes on once the script has heard of the request
    asked = f"{tmp_path}/asked"
    slow.write_text(
        f'#!/bin/bash\ntouch {tmp_path}/begun\nuntil [ -e {asked} ]; do sleep 0.1; done\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    profile = ClusterProfile(setup=(f"trap 'ask_to_stop USR2; touch {asked}' USR2",))
    job = submit_payload(profile=profile, python=str(slow), preflight="light", requeue=False)
    until((tmp_path / "begun").exists)
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    end = job.wait()
    assert (end.state, end.exit_code) == (State.STOPPED, 75)
    assert not job.said(0)
