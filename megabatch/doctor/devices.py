"""What works once it is imported: CUDA, NCCL, packages; asked in a process of its own, which a driver may crash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from megabatch.doctor.finding import Finding, fault

_TIMEOUT_S = 90
_BESIDE_TORCH = ("torchvision", "torchaudio")
"""Packages that pip installs with vLLM from PyPI, built for CUDA whatever torch is; transformers imports them."""
_NEEDED = ("megatron.core", "transformers.modeling_utils")
"""Packages that a run imports."""

PROBE = (
    f"names = {_BESIDE_TORCH + _NEEDED!r}"
    + """
import importlib.util, json
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
for name in names:
    if importlib.util.find_spec(name.partition(".")[0]):
        attempt(name, lambda: bool(__import__(name)))
print(json.dumps(found))
"""
)


def probe(code: str, *, timeout_s: float = _TIMEOUT_S) -> dict[str, Any] | str:
    """The JSON that a separate Python process prints, or its failure: a driver may crash or hang it."""
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


def devices(answer: dict[str, Any] | str) -> list[Finding]:
    if isinstance(answer, str):
        fix = 'run it to see the whole message: python -c "import torch"'
        return [Finding(name="import torch", state="broken", found=answer, needed=True, fix=fix)]
    return [_cuda(answer), _nccl(answer), *_imports(answer)]


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
    if isinstance(nccl, str) and not _failed(answer, "NCCL"):
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


def _imports(answer: dict[str, Any]) -> Iterator[Finding]:
    """Installed packages that fail to import."""
    if broken := [name for name in _BESIDE_TORCH if _failed(answer, name)]:
        names = " ".join(broken)
        build = f"cu{answer['built for CUDA'].replace('.', '')}" if answer["built for CUDA"] else "cpu"
        fix = (
            f"pip uninstall {names}; or take torch's own build: pip install --force-reinstall --no-deps "
            f"--index-url https://download.pytorch.org/whl/{build} {names}"
        )
        without = "megabatch needs neither, but where they are installed transformers' models import them"
        yield fault(f"import {', '.join(broken)}", str(answer[broken[0]]), without=without, fix=fix)
    # transformers fails because of those above, with a less clear message
    for name in [name for name in _NEEDED if _failed(answer, name) and not (broken and "transformers" in name)]:
        fix = f'run it to see the whole message: python -c "import {name}"'
        yield fault(f"import {name}", str(answer[name]), fix=fix)


def _failed(answer: dict[str, Any], name: str) -> bool:
    return str(answer.get(name)).startswith("error")
