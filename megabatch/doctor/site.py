"""Checks of a profile outside Slurm: containers, modules, folders, and a short job on a
node."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megabatch.doctor.commands import run_command
from megabatch.doctor.finding import Finding
from megabatch.slurm.profile import ClusterProfile, Container
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.variables import modules

_JOB_S = 180


def examine_site(profile: ClusterProfile, *, run: bool) -> list[Finding]:
    """Findings on this machine, and with `run` on a node, by a job of a few seconds."""
    found = [*_container(profile.container), *_modules(profile), *_folders(profile), *_secrets(profile)]
    return [*found, *_node(profile)] if run else found


def _container(container: Container | None) -> Iterator[Finding]:
    if container is None:
        return
    name = f"container ({container.runtime})"
    if container.runtime == "pyxis":
        there = "--container-image" in run_command("srun", "--help").text
        fix = 'ask the site for the Pyxis plugin, or set runtime = "apptainer"'
    else:
        there = shutil.which("apptainer") is not None
        fix = "load its module under `modules`, or ask the site; nodes may have what this machine lacks (--run checks)"
    yield Finding(
        name=name,
        state="ok" if there else "broken",
        found="found" if there else "not found here",
        needed=not there,
        fix="" if there else fix,
    )
    if container.image.startswith(("/", ".", "~")) and not Path(container.image).expanduser().exists():
        fix = "give the image's path as every node sees it"
        yield Finding(name="image", state="broken", found=f"{container.image} does not exist", needed=True, fix=fix)


def _modules(profile: ClusterProfile) -> Iterator[Finding]:
    if not profile.modules:
        return
    script = "\n".join(["set -e", *modules(profile)])
    said = run_command("bash", "-c", script, timeout_s=60)
    bad = not said.ok or "ERROR" in said.text
    yield Finding(
        name="modules",
        state="broken" if bad else "ok",
        found=said.first if bad else ", ".join(profile.modules),
        needed=bad,
        fix="`module avail` lists the available modules" if bad else "",
    )


def _folders(profile: ClusterProfile) -> Iterator[Finding]:
    if profile.shared_cache is None:
        return
    folder = Path(profile.shared_cache)
    usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    found = f"{folder} can be written" if usable else f"{folder} is not a folder that you can write to"
    fix = "" if usable else "create it, or name another folder on storage that every node sees"
    yield Finding(name="shared_cache", state="ok" if usable else "broken", found=found, needed=not usable, fix=fix)


def _secrets(profile: ClusterProfile) -> Iterator[Finding]:
    for name in profile.inherit:
        if name not in os.environ:
            without = "jobs submitted from this shell run without it"
            yield Finding(name=name, state="missing", found="not set", without=without, fix=f"export {name}")


def _node(profile: ClusterProfile) -> Iterator[Finding]:
    """Runs a job on one node: checks that steps launch there and that it sees the profile's folders and programs."""
    token = secrets.token_hex(8)
    folder = Path(profile.shared_cache or Path.cwd())
    probe = folder / f".megabatch-doctor.{token}"
    script = [
        f"if [ -e {shell(str(probe))} ]; then echo shared; fi",
        f"if [ -d {shell(profile.local_cache)} ] && [ -w {shell(profile.local_cache)} ]; then echo local; fi",
        "if command -v apptainer >/dev/null; then echo apptainer; fi",
        f"if command -v {shell(profile.python or 'python3')} >/dev/null; then echo python; fi",
        f"echo {token} $SLURMD_NODENAME",
    ]
    try:
        probe.touch()
        said = run_command("srun", *_options(profile), "bash", "-c", "\n".join(script), timeout_s=_JOB_S)
    except OSError as error:
        fix = "run this from a folder on shared storage"
        yield Finding(name="job on a node", state="broken", found=f"{probe}: {error.strerror}", needed=True, fix=fix)
        return
    finally:
        probe.unlink(missing_ok=True)
    if f"{token} " not in said.text:
        fix = "fix the faults above first; else the nodes are busy, or steps do not launch: try `srun hostname`"
        found = " ".join(said.lines[-2:]) or "no answer"
        yield Finding(name="job on a node", state="broken", found=found[:200], needed=True, fix=fix)
        return
    yield Finding(name="job on a node", state="ok", found=f"ran on {said.text.rpartition(token)[2].strip()}")
    words = {
        "shared": (f"{folder} on the node", "runs must be on storage that every node sees"),
        "local": (f"local_cache {profile.local_cache}", "name a folder on each node's own disk that you can write to"),
    }
    if profile.container is None:
        words["python"] = (f"python {profile.python or 'python3'}", "give `python` as a path that every node sees")
    elif profile.container.runtime == "apptainer":
        words["apptainer"] = ("apptainer on the node", "load its module under `modules`, or ask the site")
    for word, (name, fix) in words.items():
        there = word in said.lines
        state = "found" if there else "not found"
        yield Finding(
            name=name, state="ok" if there else "broken", found=state, needed=not there, fix="" if there else fix
        )


def _options(profile: ClusterProfile) -> list[str]:
    names = ("partition", "account", "qos", "constraint", "reservation", "exclude")
    chosen = [f"--{name}={getattr(profile, name)}" for name in names if getattr(profile, name) is not None]
    return [*chosen, "--nodes=1", "--ntasks=1", "--time=3", "--job-name=megabatch-doctor", "--quiet"]
