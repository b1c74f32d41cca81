"""Which options of a profile sbatch would refuse: GPUs, features, reservations, accounts, options, each tried
alone."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator

from megabatch.doctor.commands import Answer, run_command
from megabatch.doctor.finding import Finding, fault, fine, note
from megabatch.doctor.live import Live, in_partitions, one_of
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.roles import Allocation
from megabatch.slurm.script.gpus import gpu_options


def gpus(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    shown = run_command("sinfo", "--noheader", "--format=%G|%D", *in_partitions(profile, live)).text.splitlines()
    kinds = dict(line.strip().split("|", 1) for line in shown if "gpu" in line)
    types = sorted(set(re.findall(r"gpu:([^:(,]*[^:(,\d][^:(,]*)", " ".join(kinds))))
    if profile.gpu_type is not None and profile.gpu_type not in types:
        fix = f"gpu_type = {one_of(types)}" if types else "leave gpu_type out: Slurm has no GPU types there"
        yield fault("GPUs", f"no node there has GPUs of type {profile.gpu_type}", fix=fix)
    elif kinds:
        yield fine("GPUs", "; ".join(f"{count} nodes with {gres.split('(')[0]}" for gres, count in kinds.items()))
        yield from _gpu_request(profile, live)
    else:
        fix = "name a partition that has some: `sinfo -o '%P %G'`"
        yield note("GPUs", "no node here has GPUs", without="only runs with gpus_per_node=0", fix=fix)


def _gpu_request(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Whether sbatch accepts a request for one GPU in the profile's form."""
    one = Allocation(nodes=1, tasks_per_node=1, cpus_per_task=None, gpus_per_node=1)
    asked = [f"--{name}={value}" for name, value in gpu_options(one, profile).items()]
    said = _test_only(*in_partitions(profile, live), *asked)
    if said.ok:
        yield fine("gpu_request", " ".join(asked))
    else:
        fix = 'gpu_request = "gres", "gpus-per-node" or "gpus-per-task", as the site\'s pages say'
        yield fault("gpu_request", f"{' '.join(asked)}: {_reason(said)}", fix=fix)


def constraint(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.constraint is not None:
        yield _tried("constraint", profile.constraint, profile, live, fix="`sinfo -o '%N %f'` lists nodes' features")


def reservation(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.reservation is not None:
        fix = "`scontrol show reservation` lists them, with their users and times"
        yield _tried("reservation", profile.reservation, profile, live, fix=fix)


def _tried(name: str, value: str, profile: ClusterProfile, live: Live, *, fix: str) -> Finding:
    """Whether sbatch accepts one option; queues nothing."""
    said = _test_only(*in_partitions(profile, live), f"--{name}={value}")
    return fine(name, value) if said.ok else fault(name, f"{value}: {_reason(said)}", fix=fix)


def _test_only(*options: str) -> Answer:
    return run_command("sbatch", "--test-only", "--time=1", *options, "--wrap=true")


def _reason(said: Answer) -> str:
    for words in ("sbatch: error: ", "sbatch: ", "allocation failure: "):
        said = Answer(said.ok, said.first.removeprefix(words))
    return said.first or "sbatch refuses it"


def accounting(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    without = "states come from heartbeats, squeue and scontrol"
    if not _is_accounted(live):
        yield note("accounting", "not used by this cluster", without=without)
        return
    said = run_command("sacct", "--noheader", "--jobs=0")
    yield fine("accounting", "sacct answers") if said.ok else note("accounting", said.first, without=without)


def _is_accounted(live: Live) -> bool:
    return live.config.get("AccountingStorageType", "").endswith("/slurmdbd")


def account_and_qos(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Whether this user may use them; unknown without accounting."""
    named = {name: value for name in ("account", "qos") if (value := getattr(profile, name)) is not None}
    known = _associations() if named and _is_accounted(live) else None
    for name, value in named.items():
        if known is None:
            without = f"Slurm accepts any name, so {value} means nothing here"
            yield note(name, "cannot be checked without accounting", without=without, fix=f"leave {name} out")
        elif value in known[name]:
            yield fine(name, value)
        else:
            article = "an" if name == "account" else "a"
            fix = f"{name} = {one_of(known[name])}" if known[name] else f"ask the site for {article} {name}"
            yield fault(name, f"{getpass.getuser()} may not use {value}", fix=fix)


def _associations() -> dict[str, list[str]]:
    """The accounts and qualities of service of this user."""
    of_user = f"user={getpass.getuser()}"
    said = run_command("sacctmgr", "--noheader", "--parsable2", "show", "associations", of_user, "format=account,qos")
    rows = [line.split("|") for line in said.lines if "|" in line]
    return {
        "account": sorted({row[0] for row in rows}),
        "qos": sorted({name for row in rows for name in row[1].split(",") if name}),
    }


def options(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Tries each further sbatch option alone, so that we can name the faulty one."""
    for name, value in profile.sbatch.items():
        if value is False:
            continue
        option = f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        said = _test_only(*in_partitions(profile, live), option)
        if said.ok:
            yield fine(f"sbatch {name}", str(value))
        else:
            yield fault(f"sbatch {name}", f"{option}: {_reason(said)}", fix="`man sbatch` lists options and values")
