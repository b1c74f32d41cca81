"""The example profiles and the container recipes that ship with the launcher."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from megabatch.doctor.requirements import REQUIREMENTS
from megabatch.doctor.versions import supports
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import load_profile
from megabatch.slurm.render import render

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "slurm" / "containers"
EXAMPLES = sorted((ROOT / "slurm" / "examples").glob("*.toml"))
INSTALL = (CONTAINERS / "install.sh").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_profile_whose_script_is_bash(path: Path) -> None:
    profile = load_profile(str(path))
    gpus = 0 if path.stem == "cpu" else 8
    job = JobSpec(
        name="x", run_directory=Path("/runs/x"), nodes=2, tasks_per_node=8, gpus_per_node=gpus, preflight="full"
    )
    script = render(job, profile)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for value in (profile.partition, profile.container and profile.container.image, profile.python):
        assert value is None or value in script
    if gpus:
        assert "NCCL_SOCKET_IFNAME" in script


def test_there_is_one_for_each_kind_of_site() -> None:
    profiles = {path.stem: load_profile(str(path)) for path in EXAMPLES}
    assert {profile.network for profile in profiles.values()} >= {"infiniband", "efa", "roce", "ethernet"}
    assert {p.container.runtime for p in profiles.values() if p.container} == {"pyxis", "apptainer"}


def test_images_hold_what_pyproject_allows() -> None:
    subprocess.run(["bash", "-n"], input=INSTALL, text=True, check=True)
    pins = {name.lower().replace("_", "-"): pin for name, pin in re.findall(r"^([A-Z_]+)=(\d[\d.]*)$", INSTALL, re.M)}
    ranges = {requirement.name: requirement.supported for requirement in REQUIREMENTS}
    assert set(pins) == {"transformer-engine", "flash-attn", "vllm"}
    for name, pin in pins.items():
        assert supports(ranges[name], pin), f"{name} {pin} is not in {ranges[name]}"
        assert re.search(rf'"{name}(\[[\w,-]+\])?==\${name.upper().replace("-", "_")}"', INSTALL), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("transformer-engine") for line in extras["gpu"])
    assert "--constraint constraints.txt" in INSTALL and "'.[train]'" in INSTALL
    flash = next(requirement for requirement in REQUIREMENTS if requirement.name == "flash-attn")
    assert f"flash-attn=={pins['flash-attn']}" in flash.fix, "doctor names the same one"


def test_both_images_are_one() -> None:
    docker, apptainer = (CONTAINERS / "Dockerfile").read_text(), (CONTAINERS / "megabatch.def").read_text()
    [base] = re.findall(r"^FROM (\S+)$", docker, re.M)
    assert re.findall(r"^From: (\S+)$", apptainer, re.M) == [base]
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-cudnn-devel-ubuntu24\.04", base), "Python 3.12, for constraints.txt"
    for text in (docker, apptainer):
        assert "bash slurm/containers/install.sh" in text and "/opt/megabatch/bin" in text
    assert 'python_version >= "3.12"' in (ROOT / "constraints.txt").read_text()
