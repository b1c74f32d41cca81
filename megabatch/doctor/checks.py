"""Checks this machine: Python, packages by metadata and by import, Slurm."""

from __future__ import annotations

import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version

from megabatch.doctor.commands import run_command
from megabatch.doctor.devices import PROBE, devices, probe
from megabatch.doctor.finding import Finding, State, fine, note
from megabatch.doctor.pairs import Installed, wrong_build, wrong_pairs
from megabatch.doctor.requirements import PYTHON, REQUIREMENTS, Requirement
from megabatch.doctor.versions import supports

_SLURM_TIMEOUT_S = 10


def examine() -> list[Finding]:
    """Every finding, in dependency order."""
    installed = {requirement.name: _installed(requirement) for requirement in REQUIREMENTS}
    trains = any(installed[requirement.name] for requirement in REQUIREMENTS if requirement.level == "train")
    found = [_python(), *(_package(one, installed[one.name], trains=trains) for one in REQUIREMENTS)]
    found += wrong_pairs(installed)
    if any(finding.name == "torch" and finding.state == "ok" for finding in found):
        answer = probe(PROBE)
        found += devices(answer)
        if isinstance(answer, dict):
            found += wrong_build(installed, built_for=answer["built for CUDA"])
    return [*found, *_slurm()]


def _python() -> Finding:
    have = platform.python_version()
    state: State = "ok" if supports(PYTHON, have) else "unsupported"
    return Finding(
        name="Python", state=state, found=have, supported=PYTHON, needed=state != "ok", fix="use Python 3.11"
    )


def _installed(requirement: Requirement) -> Installed | None:
    for name in (requirement.name, *requirement.builds):
        try:
            return Installed(name, version(name))
        except PackageNotFoundError:
            continue
    return None


def _package(requirement: Requirement, have: Installed | None, *, trains: bool) -> Finding:
    """A machine with none of the training packages only plans and submits, and does not need them."""
    if have is None:
        state: State = "missing"
    else:
        state = "ok" if supports(requirement.supported, have.version) else "unsupported"
    needed = requirement.level == "core" or (requirement.level == "train" and trains)
    build = "" if have is None or have.name == requirement.name else f" ({have.name})"
    return Finding(
        name=requirement.name,
        state=state,
        found="" if have is None else f"{have.version}{build}",
        supported=requirement.supported,
        needed=needed and state != "ok",
        without=requirement.without,
        fix="" if state == "ok" else requirement.fix,
    )


def _slurm() -> list[Finding]:
    without = "recipes run here with --local; --dry_run shows the script for a cluster"
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        fix = "log in to a node of the cluster, or for a private one: apt install slurm-wlm munge; make cluster"
        return [Finding(name="Slurm", state="missing", without=without, fix=fix)]
    have = re.match(r"slurm\S* (\S+)", _said("sbatch", "--version"))
    # without a configuration sbatch does not even print its version; the controller's finding reports that
    found = [fine("Slurm", have[1] if have else "installed")]
    said = _said("scontrol", "ping")
    if "UP" in said:
        found.append(fine("Slurm controller", "answers"))
    else:
        fix = "check SLURM_CONF and the network; for a private cluster: make cluster"
        first = (said.strip().splitlines() or ["no answer"])[0]
        found.append(note("Slurm controller", first, without=without, fix=fix))
    accounting = _said("sacct", "--noheader", "--jobs=0")
    if shutil.which("sacct") is None or "error" in accounting.lower() or "disabled" in accounting.lower():
        without = "states come from heartbeats, squeue and scontrol"
        found.append(note("Slurm accounting", "", without=without, fix="ask the site for slurmdbd"))
    return found


def _said(*command: str) -> str:
    return run_command(*command, timeout_s=_SLURM_TIMEOUT_S).text
