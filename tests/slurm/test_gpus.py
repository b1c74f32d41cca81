"""GPUs asked for in each form that sites want, by number alone and by type, on a Slurm whose GPUs have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch.config.roles import Role
from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.render import render

from .conftest import Submit

JOB = JobSpec(name="j", run_directory=Path("/runs/j"), tasks_per_node=4, gpus_per_node=4)
FORMS = ("gpus-per-node", "gres", "gpus-per-task")


def asked(job: JobSpec, **profile: Any) -> list[str]:
    lines = render(job, ClusterProfile(**profile)).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH --g")]


@pytest.mark.parametrize(
    ("profile", "lines"),
    [
        ({}, ["--gpus-per-node=4"]),
        ({"gpu_type": "a100"}, ["--gpus-per-node=a100:4"]),
        ({"gpu_request": "gres"}, ["--gres=gpu:4"]),
        ({"gpu_request": "gres", "gpu_type": "h100"}, ["--gres=gpu:h100:4"]),
        ({"gpu_request": "gres", "sbatch": {"gres": "nvme:1"}}, ["--gres=gpu:4,nvme:1"]),
        ({"sbatch": {"gres": "nvme:1"}}, ["--gres=nvme:1", "--gpus-per-node=4"]),
        ({"gpu_request": "gpus-per-task"}, ["--gpus-per-task=1"]),
        ({"gpu_request": "gpus-per-task", "gpu_type": "a100"}, ["--gpus-per-task=a100:1"]),
    ],
)
def test_the_form_and_the_type(profile: dict[str, Any], lines: list[str]) -> None:
    assert asked(JOB, **profile) == lines
    assert [line for line in asked(replace(JOB, gpus_per_node=0), **profile) if "gpu" in line] == []


def test_gpus_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(LaunchError, match="the 4 GPUs of a node must divide by its 3 tasks"):
        asked(replace(JOB, tasks_per_node=3), gpu_request="gpus-per-task")


@pytest.mark.slurm
@pytest.mark.parametrize("gpu_type", [None, "a100"])
@pytest.mark.parametrize("form", FORMS)
def test_every_rank_sees_all_gpus_of_its_node(
    submit_payload: Submit, scontrol: Callable[..., str], form: Any, gpu_type: str | None
) -> None:
    profile = ClusterProfile(gpu_request=form, gpu_type=gpu_type)
    job = submit_payload(profile=profile, nodes=2, tasks_per_node=2, gpus_per_node=2)
    assert job.wait().state is State.COMPLETED, job.batch_log()
    shown = scontrol("show", "job", job.job_id)
    assert f"gres/gpu{f':{gpu_type}' if gpu_type else ''}" in shown or "gres:gpu" in shown, shown
    for rank in range(4):
        environment = job.said(rank)[0]["environment"]
        assert len(environment["CUDA_VISIBLE_DEVICES"].split(",")) == 2, environment["CUDA_VISIBLE_DEVICES"]
        assert environment["LOCAL_RANK"] == str(rank % 2)


@pytest.mark.slurm
@pytest.mark.parametrize("form", FORMS)
def test_a_server_beside_the_ranks_has_gpus_of_its_own(submit_payload: Submit, form: Any) -> None:
    command = ("python", str(Path(__file__).with_name("server.py")))
    role = Role(name="server", command=command, gpus_per_node=4, ready_s=60)
    profile = ClusterProfile(gpu_request=form, gpu_type="a100")
    job = submit_payload(profile=profile, tasks_per_node=2, gpus_per_node=2, roles=(role,))
    assert job.wait().state is State.COMPLETED, job.batch_log()
    [log] = job.run.logs.glob("server_*.log")
    [devices] = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("sees ")]
    assert len(devices.split(",")) == 4
    assert len(job.said(1)[0]["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == 2


@pytest.mark.slurm
@pytest.mark.parametrize("form", FORMS)
def test_the_preflight_sees_all_gpus_of_a_node(
    submit_payload: Submit, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi's stand-in lists what the step was given."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES" >>"$SEEN"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin")
    profile = ClusterProfile(gpu_request=form, gpu_type="a100")
    job = submit_payload(profile=profile, tasks_per_node=2, gpus_per_node=2, preflight="light", requeue=False)
    job.wait()
    assert len((tmp_path / "seen").read_text().split()[0].split(",")) == 2
