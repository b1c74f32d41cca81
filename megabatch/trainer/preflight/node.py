"""Checks of one node without torch: GPUs by nvidia-smi's CSV, the kernel's Xid lines, disks, memory.

The fields are those of `nvidia-smi --help-query-gpu` and `--help-query-remapped-rows`. Values that a driver does not
know (`[N/A]`, `[Not Supported]`) are no fault; a field that it does not know is left out.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 30
_GIB = 1 << 30
_RECENT_S = 3600
_MIB_USED = 2048
"""More than what driver and display take on an idle GPU."""
_DISK_GIB = 1.0
_SHM_MIB = 64
"""Docker's default for a container, in which NCCL and data workers fail."""

_REASONS, _RENAMED = "clocks_throttle_reasons.", "clocks_event_reasons."
"""The reasons of throttling, and what newer drivers call them."""
_COUNTERS = {"ecc.errors.uncorrected.volatile.total": "uncorrectable ECC errors since the driver was loaded"}
_FLAGS = {
    "retired_pages.pending": "a memory page is waiting to be retired: the GPU needs a reset",
    "clocks_throttle_reasons.hw_slowdown": "the hardware has lowered its clocks",
    "clocks_throttle_reasons.hw_thermal_slowdown": "too hot: the hardware has lowered its clocks",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "the power brake has lowered its clocks",
}
_REMAPPED = {
    "remapped_rows.pending": "a memory row is waiting to be remapped: the GPU needs a reset",
    "remapped_rows.failure": "a memory row could not be remapped: the GPU needs replacing",
}
_HARDWARE_XIDS = {
    48: "double-bit ECC error",
    63: "row remapping or page retirement",
    64: "row remapping failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many single-bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
}
"""Those that NVIDIA's catalogue of Xid errors puts down to hardware, not to a program (13, 31, 43)."""


@dataclass(frozen=True, slots=True)
class Bad:
    """One thing that is wrong with a node."""

    check: str
    """`gpus`, `ecc`, `throttling`, `memory`, `xid`, `disk`, `shm`, `clock`, `matmul`, `link` or `answer`."""
    value: str
    """What was seen."""
    rule: str
    """What it should be."""


def faults(*, gpus: int, local_cache: Path, ranks: int) -> list[Bad]:
    """Everything that is wrong here as far as this node alone can tell; `ranks` of the run start on it."""
    found = [*_disk(local_cache), *_shared_memory(ranks)]
    if gpus:
        found += [*_gpus(gpus), *_xids()]
    return found


class _SmiError(Exception):
    pass


def _gpus(wanted: int) -> Iterator[Bad]:
    fields = ("index", "uuid", "name", "memory.used", *_COUNTERS, *_FLAGS)
    try:
        rows = _query("gpu", fields)
        remapped = _query("remapped-rows", ("gpu_uuid", *_REMAPPED), optional=True)
    except _SmiError as error:
        yield Bad("gpus", str(error), f"nvidia-smi lists {wanted} GPUs")
        return
    allotted = _visible(rows)
    if len(allotted) < wanted:
        yield Bad("gpus", f"{len(allotted)} GPUs", f"{wanted} were requested")
    for row in allotted:
        yield from _gpu(row)
    numbers = {row.get("uuid"): row.get("index") for row in allotted}
    for row in remapped:
        number = numbers.get(row.get("gpu_uuid"))
        for field, meaning in _REMAPPED.items():
            if number is not None and _raised(row.get(field, "")):
                yield Bad("ecc", f"GPU {number}: {field}={row[field]}", meaning)


def _visible(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The GPUs of this job: where Slurm does not confine devices, nvidia-smi lists other jobs' too."""
    names = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip().isdigit()]
    if len(rows) <= len(names) or not names:
        return rows
    return [row for row in rows if row.get("index") in names]


def _gpu(row: dict[str, str]) -> Iterator[Bad]:
    where = f"GPU {row.get('index', '?')}"
    if any("lost" in value.lower() or "error" in value.lower() for value in row.values()):
        yield Bad("gpus", f"{where}: {', '.join(row.values())}", "answers nvidia-smi")
    used = _number(row.get("memory.used", ""))
    if used is not None and used > _MIB_USED:
        rule = f"at most {_MIB_USED} MiB before the run starts: another process, or one left behind, holds it"
        yield Bad("memory", f"{where}: {used:.0f} MiB in use", rule)
    for field, meaning in _COUNTERS.items():
        if _number(row.get(field, "")):
            yield Bad("ecc", f"{where}: {field}={row[field]}", meaning)
    for field, meaning in _FLAGS.items():
        if _raised(row.get(field, "")):
            check = "throttling" if field.startswith("clocks") else "ecc"
            yield Bad(check, f"{where}: {field}={row[field]}", meaning)


def _number(text: str) -> float | None:
    match = re.match(r"\s*(\d+(?:\.\d+)?)", text)
    return float(match[1]) if match else None


def _raised(text: str) -> bool:
    """Flags are spelled `Active`/`Not Active` or `Yes`/`No`, row remappings also `1`/`0`."""
    return text.strip().lower() in ("active", "yes", "1")


def _query(what: str, fields: Sequence[str], *, optional: bool = False) -> list[dict[str, str]]:
    """One row for each GPU. Raises: _SmiError when nvidia-smi is missing, hangs or fails, unless `optional`."""
    wanted = list(fields)
    while wanted:
        command = ["nvidia-smi", f"--query-{what}={','.join(wanted)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except OSError as error:
            raise _SmiError(f"nvidia-smi: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise _SmiError(f"nvidia-smi does not answer within {_TIMEOUT_S} s") from error
        unknown = re.search(r'"(.+?)" is not a valid field', done.stdout + done.stderr)
        if unknown is not None and unknown[1] in wanted:
            wanted = [name for field in wanted for name in _instead(field, unknown[1])]
        elif done.returncode and optional:
            return []
        elif done.returncode:
            said = " ".join((done.stdout + done.stderr).split()) or "no message"
            raise _SmiError(f"nvidia-smi failed with exit code {done.returncode}: {said[:200]}")
        else:
            rows = csv.reader(line for line in done.stdout.splitlines() if line.strip())
            names = [field.replace(_RENAMED, _REASONS) for field in wanted]
            return [dict(zip(names, map(str.strip, row), strict=False)) for row in rows]
    return []


def _instead(field: str, unknown: str) -> list[str]:
    """What to ask instead of a field that this driver does not know: its newer name, or nothing."""
    if field != unknown:
        return [field]
    return [field.replace(_REASONS, _RENAMED)] if field.startswith(_REASONS) else []


def _xids() -> Iterator[Bad]:
    """Hardware errors that the driver told the kernel in the last hour; where its log may not be read, nothing."""
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return
    for seconds, device, code in re.findall(r"\[\s*([\d.]+)\] NVRM: Xid \((.*?)\): (\d+)", done.stdout):
        meaning = _HARDWARE_XIDS.get(int(code))
        if meaning and uptime - float(seconds) < _RECENT_S:
            yield Bad("xid", f"Xid {code} on {device}", f"{meaning}, in the last hour")


def _disk(folder: Path) -> Iterator[Bad]:
    try:
        free = shutil.disk_usage(folder).free / _GIB
    except OSError as error:
        yield Bad("disk", f"{folder}: {error.strerror}", "the local cache is a folder on each node")
        return
    if free < _DISK_GIB:
        yield Bad("disk", f"{free:.2f} GiB free in {folder}", f"at least {_DISK_GIB:.0f} GiB for compiled kernels")


def _shared_memory(ranks: int) -> Iterator[Bad]:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return
    mib = found.f_frsize * found.f_blocks >> 20
    if mib < _SHM_MIB * ranks:
        yield Bad("shm", f"/dev/shm has {mib} MiB", f"at least {_SHM_MIB} MiB for each of {ranks} ranks")
