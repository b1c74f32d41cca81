"""Containers: what Pyxis and Apptainer are given, and jobs of the private Slurm inside a real Apptainer.

The image is this machine's own /usr in a folder of its own, so nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.slurm.container import inside, srun_flags
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile, Container
from megabatch.slurm.queue import State
from megabatch.slurm.render import render
from megabatch.slurm.snapshot import snapshot_of

from .conftest import PAYLOAD, Submit

JOB = JobSpec(name="j", run_directory=Path("/runs/j"), gpus_per_node=8, inherit=("HF_TOKEN",))
PYXIS = ClusterProfile(
    container=Container(image="a#b:c", mounts=("/data", "/a:/b:ro"), options=("--no-container-mount-home",))
)
APPTAINER = ClusterProfile(container=Container(image="/i.sif", runtime="apptainer", options=("--cleanenv",)))


def test_pyxis_lets_our_variables_win_over_the_images() -> None:
    flags = dict(flag.partition("=")[::2] for flag in srun_flags(JOB, PYXIS))
    names = flags["--container-env"].split(",")
    assert {"PYTHONPATH", "MASTER_ADDR", "WORLD_SIZE", "HF_TOKEN", "NCCL_DEBUG", "OMP_NUM_THREADS"} <= set(names)
    assert len(names) == len(set(names))
    assert "/runs/j:/runs/j" in flags["--container-mounts"].split(",")
    assert {"/data:/data", "/a:/b:ro"} <= set(flags["--container-mounts"].split(","))
    assert "/tmp:/tmp" in flags["--container-mounts"].split(","), "enroot's own /tmp is memory"
    assert "--no-container-mount-home" in flags


def test_apptainer_gets_options_before_the_image() -> None:
    words = inside(JOB, APPTAINER)
    assert words[words.index("/i.sif") - 1] == "--cleanenv"
    assert "--nv" in words and "--nv" not in inside(replace(JOB, gpus_per_node=0), APPTAINER)


@pytest.mark.parametrize("profile", [PYXIS, APPTAINER])
def test_the_hosts_own_packages_stay_outside(profile: ClusterProfile) -> None:
    job = replace(JOB, snapshot=Path("/s/0123.tar"))
    assert 'export PYTHONPATH="$code"\n' in render(job, profile)
    assert 'export PYTHONPATH="$code${PYTHONPATH' in render(job, ClusterProfile())


@pytest.mark.parametrize("level", ["light", "full"])
@pytest.mark.parametrize("profile", [PYXIS, APPTAINER])
def test_the_preflight_runs_in_the_same_container(profile: ClusterProfile, level: str) -> None:
    script = render(replace(JOB, preflight=level), profile)  # type: ignore[arg-type]
    [step] = [line for line in script.splitlines() if "megabatch.trainer.preflight" in line]
    image = profile.container.image if profile.container else ""
    assert image in step and "--ntasks-per-node=1" in step


def test_nothing_needs_ssh() -> None:
    for profile in (PYXIS, APPTAINER, ClusterProfile(modules=("cuda",))):
        for nodes in (1, 64):
            script = render(replace(JOB, nodes=nodes, preflight="full"), profile)
            assert not [word for word in ("ssh", "scp", "pdsh", "mpirun") if word in script.split()]


@pytest.fixture
def contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    """A folder that Apptainer runs, with this machine's /usr and this Python, and a PYTHONPATH of its own."""
    if shutil.which("apptainer") is None:
        pytest.skip("no Apptainer here")
    # a root that lacks a capability, as in many sandboxes, may not hand all of them on
    monkeypatch.setenv("APPTAINER_NO_PRIVS", "1")
    box = tmp_path / "box"
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "root", "home", "var/tmp"):
        (box / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path(f"/{name}").is_symlink():
            (box / name).symlink_to(os.readlink(f"/{name}"))
    for name in ("passwd", "group", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", box / "etc")
    definition = tmp_path / "image.def"
    own = "export PYTHONPATH=/image OMP_NUM_THREADS=99 FROM_IMAGE=yes"
    definition.write_text(f"Bootstrap: localimage\nFrom: {box}\n\n%environment\n    {own}\n")
    image = tmp_path / "image"
    command = ["apptainer", "build", "--sandbox", str(image), str(definition)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if built.returncode:
        pytest.skip(f"Apptainer builds nothing here: {built.stderr.strip()[-300:]}")
    mounts = ("/usr", sys.prefix, str(PAYLOAD.parent))
    container = Container(image=str(image), runtime="apptainer", python=sys.executable, mounts=mounts)
    bind = [word for mount in mounts for word in ("--bind", mount)]
    tried = subprocess.run(
        ["apptainer", "exec", *bind, str(image), sys.executable, "-c", "print(6 * 7)"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if tried.stdout.strip() != "42":
        pytest.skip(f"Apptainer does not run here: {tried.stderr.strip()[-300:]}")
    return container


@pytest.mark.slurm
@pytest.mark.parametrize("options", [(), ("--cleanenv",)])
def test_ranks_in_apptainer_see_what_they_would_see_outside(
    submit_payload: Submit,
    contained: Container,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    snapshot = snapshot_of(tmp_path / "code")
    snapshot.store()
    job = submit_payload(
        profile=ClusterProfile(container=replace(contained, options=options), local_cache=str(tmp_path)),
        nodes=2,
        snapshot=snapshot.path,
        preflight="light",
        environment={"COMMAS": "^lo,docker 'x'\n$(y)"},
        inherit=("HF_TOKEN",),
        working_directory=tmp_path,
    )
    assert job.wait().state is State.COMPLETED, job.batch_log()
    assert "preflight of 2 nodes: ok" in job.batch_log()
    seen = [job.said(rank)[0] for rank in range(2)]
    for rank, words in enumerate(seen):
        environment = words["environment"]
        assert (environment["FROM_IMAGE"], environment["RANK"]) == ("yes", str(rank))
        code = tmp_path / f"megabatch-{os.getuid()}" / "code" / snapshot.path.name[:16]
        assert environment["PYTHONPATH"] == str(code), "the image's own would hide the snapshot"
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["COMMAS"] == "^lo,docker 'x'\n$(y)"
        assert environment["HF_TOKEN"] == "hf_verysecret"
        assert words["cwd"] == str(tmp_path)
        assert Path(environment["MEGABATCH_RUN"]) == job.run.path


@pytest.mark.slurm
def test_a_request_to_stop_reaches_ranks_in_apptainer(
    submit_payload: Submit, contained: Container, tmp_path: Path
) -> None:
    profile = ClusterProfile(container=contained, local_cache=str(tmp_path))
    job = submit_payload(profile=profile, requeue=False, options={"until_attempt": 1})
    job.wait_listening()
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    end = job.wait()
    assert (end.state, end.exit_code) == (State.STOPPED, 75), job.batch_log()
    assert job.said(0)[-1] == {"stopped": "SIGUSR2"}
