"""What a node says of itself. An executable of ours stands in for nvidia-smi and dmesg: there is no GPU here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.trainer.preflight import node

FAKE = Path(__file__).parents[2] / "slurm" / "fake_nvidia_smi.py"


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


Answer = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """What is wrong with a node of `wanted` GPUs whose nvidia-smi answers so."""
    program(tmp_path / "nvidia-smi", f"#!{sys.executable} -S\n{FAKE.read_text()}")
    program(tmp_path / "dmesg", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def ask_(*, wanted: int = 2, **answer: Any) -> list[tuple[str, str]]:
        (tmp_path / "here.json").write_text(json.dumps(answer))
        return [(bad.check, bad.value) for bad in node.faults(gpus=wanted, local_cache=tmp_path, ranks=0)]

    return ask_


def test_a_healthy_node(ask: Answer) -> None:
    assert ask() == []


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("ecc.errors.uncorrected.volatile.total", "1", "ecc"),
        ("remapped_rows.pending", "Yes", "ecc"),
        ("remapped_rows.failure", "1", "ecc"),
        ("retired_pages.pending", "Yes", "ecc"),
        ("clocks_throttle_reasons.hw_thermal_slowdown", "Active", "throttling"),
        ("memory.used", "70123", "memory"),
        ("memory.used", "[GPU is lost]", "gpus"),
    ],
)
def test_each_fault_is_named_with_the_gpu_and_the_field(ask: Answer, field: str, value: str, check: str) -> None:
    found = ask(values={field: value})
    assert [bad[0] for bad in found] == [check]
    assert found[0][1].startswith("GPU 0: ") and value in found[0][1]


@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]", "[Unknown]", ""])
def test_what_a_gpu_does_not_know_is_no_fault(ask: Answer, value: str) -> None:
    assert ask(values={"ecc.errors.uncorrected.volatile.total": value, "memory.used": value}) == []


def test_fields_of_other_drivers_are_asked_by_their_other_name_or_left_out(ask: Answer) -> None:
    names = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
    unknown = [f"clocks_throttle_reasons.{name}" for name in names] + ["retired_pages.pending", "gpu_uuid"]
    assert ask(unknown=unknown) == []
    assert ask(unknown=unknown, values={"clocks_event_reasons.hw_slowdown": "Active"}) == [
        ("throttling", "GPU 0: clocks_throttle_reasons.hw_slowdown=Active")
    ]


def test_a_missing_or_failing_nvidia_smi_and_missing_gpus(
    ask: Answer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ask(exit=15)[0][1].startswith("nvidia-smi failed with exit code 15: Unable to determine")
    assert ask(wanted=8) == [("gpus", "2 GPUs")]
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask() == [("gpus", "nvidia-smi: No such file or directory")]


def test_only_this_jobs_gpus_count(ask: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    faults = {"memory.used": "70123", "remapped_rows.failure": "Yes"}
    assert ask(gpus=8, values=faults) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert [check for check, _ in ask(gpus=8, values=faults)] == ["memory", "ecc"]


def test_recent_hardware_xids_are_faults_and_a_programs_own_are_not(ask: Answer, tmp_path: Path) -> None:
    up = float(Path("/proc/uptime").read_text().split()[0])
    lines = [
        f"[{up - 60:.6f}] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
        f"[{up - 50:.6f}] NVRM: Xid (PCI:0000:3b:00): 31, pid=1, MMU fault",
        f"[{up - 7200:.6f}] NVRM: Xid (PCI:0000:5e:00): 48, pid=1",
    ]
    program(tmp_path / "dmesg", "#!/bin/sh\ncat <<'E'\n" + "\n".join(lines) + "\nE\n")
    found = ask()
    assert found[:1] == [("xid", "Xid 79 on PCI:0000:3b:00")]
    assert not any("Xid 31" in value for _, value in found)
    if up > 7200:
        assert not any("Xid 48" in value for _, value in found)


def test_disk_and_shared_memory(tmp_path: Path) -> None:
    [missing] = node.faults(gpus=0, local_cache=tmp_path / "nowhere", ranks=0)
    assert (missing.check, missing.value) == ("disk", f"{tmp_path}/nowhere: No such file or directory")
    [small] = node.faults(gpus=0, local_cache=tmp_path, ranks=10**6)
    assert small.check == "shm" and "1000000 ranks" in small.rule
