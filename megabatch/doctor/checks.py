"""Looking at this machine: Python, packages by their metadata, CUDA and NCCL in a process of their own, Slurm."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from megabatch.doctor.requirements import PYTHON, REQUIREMENTS, Requirement
from megabatch.doctor.versions import supports

State = Literal["ok", "missing", "unsupported", "broken"]
_PROBE_TIMEOUT_S = 90
_SLURM_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found of one thing."""

    name: str
    state: State
    found: str = ""
    """Version, or what went wrong."""
    supported: str = ""
    needed: bool = False
    """Whether this machine cannot do its part as it is."""
    without: str = ""
    fix: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order in which things depend on each other."""
    packages = [_package(requirement) for requirement in REQUIREMENTS]
    trains = any(f.state != "missing" for f, r in zip(packages, REQUIREMENTS, strict=True) if r.level == "train")
    levels = {requirement.name: requirement.level for requirement in REQUIREMENTS}
    found = [_python(), *(_judged(finding, level=levels[finding.name], trains=trains) for finding in packages)]
    if any(finding.name == "torch" and finding.state == "ok" for finding in found):
        found += _devices(probe(_PROBE))
    return [*found, *_slurm()]


def _python() -> Finding:
    have = platform.python_version()
    state: State = "ok" if supports(PYTHON, have) else "unsupported"
    return Finding(
        name="Python", state=state, found=have, supported=PYTHON, needed=state != "ok", fix="use Python 3.11"
    )


def _package(requirement: Requirement) -> Finding:
    try:
        have = version(requirement.name)
    except PackageNotFoundError:
        state: State = "missing"
        have = ""
    else:
        state = "ok" if supports(requirement.supported, have) else "unsupported"
    return Finding(
        name=requirement.name,
        state=state,
        found=have,
        supported=requirement.supported,
        without=requirement.without,
        fix="" if state == "ok" else requirement.fix,
    )


def _judged(finding: Finding, *, level: str, trains: bool) -> Finding:
    """On a machine with none of the training packages, which only plans and submits, they are not needed."""
    failed = finding.state != "ok"
    needed = failed and (level == "core" or (level == "train" and trains))
    needed = needed or (level == "optional" and finding.state == "broken")
    return Finding(**{name: getattr(finding, name) for name in finding.__slots__ if name != "needed"}, needed=needed)


_PROBE = """\
import json
found = {}
def attempt(name, work):
    try:
        found[name] = work()
    except BaseException as error:
        found[name] = f"error: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
import torch
attempt("CUDA", lambda: torch.version.cuda if torch.cuda.is_available() else None)
attempt("built for CUDA", lambda: torch.version.cuda)
attempt("GPUs", lambda: [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
def nccl():
    if torch.distributed.is_nccl_available():
        return ".".join(map(str, torch.cuda.nccl.version()))
attempt("NCCL", nccl)
if found["CUDA"]:
    attempt("kernel", lambda: float(torch.ones(8, device="cuda").sum()))
attempt("megatron", lambda: bool(__import__("megatron.core")))
print(json.dumps(found))
"""


def probe(code: str, *, timeout_s: float = _PROBE_TIMEOUT_S) -> dict[str, Any] | str:
    """What a Python process of its own prints as JSON, or what went wrong: a driver may crash or hang it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"error: {last}"
    return answer if isinstance(answer, dict) else f"error: {answer!r}"


def _devices(answer: dict[str, Any] | str) -> list[Finding]:
    if isinstance(answer, str):
        fix = 'run it to see the whole message: python -c "import torch"'
        return [Finding(name="import torch", state="broken", found=answer, needed=True, fix=fix)]
    return [_cuda(answer), _nccl(answer), *_megatron(answer)]


def _cuda(answer: dict[str, Any]) -> Finding:
    without = "training runs on CPUs (gpus_per_node=0), for tests and small models"
    gpus, kernel = answer["GPUs"], str(answer.get("kernel", ""))
    if kernel.startswith("error"):
        fix = "the driver is older than this torch's CUDA, or a GPU is in a bad state: compare nvidia-smi"
        return Finding(name="CUDA", state="broken", found=kernel, needed=True, without=without, fix=fix)
    if answer["CUDA"] and isinstance(gpus, list):
        return Finding(name="CUDA", state="ok", found=f"{answer['CUDA']}, {len(gpus)} x {gpus[0]}")
    if answer["built for CUDA"] is None:
        fix = "for GPUs install torch's CUDA build; see https://pytorch.org/get-started/locally"
        return Finding(name="CUDA", state="missing", found="torch is a CPU build", without=without, fix=fix)
    driver = shutil.which("nvidia-smi")
    fix = "nvidia-smi shows the GPUs: check CUDA_VISIBLE_DEVICES" if driver else "no NVIDIA driver on this machine"
    return Finding(name="CUDA", state="missing", found="no GPU is visible", without=without, fix=fix)


def _nccl(answer: dict[str, Any]) -> Finding:
    without = "ranks communicate through gloo (distributed_backend=gloo), on CPUs"
    nccl = answer["NCCL"]
    if isinstance(nccl, str) and not nccl.startswith("error"):
        return Finding(name="NCCL", state="ok", found=nccl)
    needed = bool(answer["CUDA"])
    fix = "install torch's CUDA build, which brings NCCL"
    return Finding(
        name="NCCL",
        state="broken" if needed else "missing",
        found=nccl or "not in this torch",
        needed=needed,
        without=without,
        fix=fix,
    )


def _megatron(answer: dict[str, Any]) -> list[Finding]:
    """Only when it is there and does not import: its metadata has been reported already."""
    outcome = str(answer.get("megatron"))
    if not outcome.startswith("error") or "ModuleNotFoundError: No module named 'megatron" in outcome:
        return []
    fix = 'run it to see the whole message: python -c "import megatron.core"'
    return [Finding(name="import megatron.core", state="broken", found=outcome, needed=True, fix=fix)]


def _slurm() -> list[Finding]:
    without = "recipes run here with --local; --dry_run shows the script for a cluster"
    sbatch = shutil.which("sbatch")
    if sbatch is None or shutil.which("srun") is None:
        fix = "log in to a node of the cluster, or for a private one: apt install slurm-wlm munge; make cluster"
        return [Finding(name="Slurm", state="missing", without=without, fix=fix)]
    have = re.match(r"slurm\S* (\S+)", _output("sbatch", "--version"))
    # without a configuration sbatch does not even tell its version; the controller's line says so
    found = [Finding(name="Slurm", state="ok", found=have[1] if have else "installed")]
    said = _output("scontrol", "ping")
    if "UP" in said:
        found.append(Finding(name="Slurm controller", state="ok", found="answers"))
    else:
        fix = "check SLURM_CONF and the network; for a private cluster: make cluster"
        first = (said.strip().splitlines() or ["no answer"])[0]
        found.append(Finding(name="Slurm controller", state="missing", found=first, without=without, fix=fix))
    accounting = _output("sacct", "--noheader", "--jobs=0")
    if shutil.which("sacct") is None or "error" in accounting.lower() or "disabled" in accounting.lower():
        note = "states come from heartbeats, squeue and scontrol"
        found.append(Finding(name="Slurm accounting", state="missing", without=note, fix="ask the site for slurmdbd"))
    return found


def _output(*command: str) -> str:
    """Both streams of a command; empty when it does not start or hangs."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SLURM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
