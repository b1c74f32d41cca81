"""Comparing a cluster profile with the live cluster: what a job of this profile would be refused for, before it is."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from megabatch.config.walltime import seconds
from megabatch.doctor.ask import Answer, ask
from megabatch.doctor.checks import Finding
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.roles import Allocation
from megabatch.slurm.script.gpus import gpu_options

_SAVE_S = 30


@dataclass(frozen=True, slots=True)
class Live:
    """What Slurm says of itself, asked once."""

    config: dict[str, str]
    """`scontrol show config`."""
    partitions: dict[str, dict[str, str]]
    """`scontrol show partition`, by name."""
    nodes: dict[str, str]
    """Generic resources of each node, by name."""


def examine_cluster(profile: ClusterProfile) -> list[Finding]:
    """One finding for each thing that the profile names or a run relies on; the rest is left out where Slurm is."""
    said = ask("scontrol", "ping")
    if not said.ok or "UP" not in said.text:
        fix = "log in to a node of the cluster, or check SLURM_CONF; for a private cluster: make cluster"
        return [_fault("Slurm controller", said.first or "no answer", fix=fix)]
    live = Live(_config(), _partitions(), _nodes())
    checks = (_partition, _time, _nodes_named, _gpus, _constraint, _reservation, _accounts, _options, _settings)
    return [_fine("Slurm controller", "answers"), *(finding for check in checks for finding in check(profile, live))]


def _fine(name: str, found: str) -> Finding:
    return Finding(name=name, state="ok", found=found)


def _note(name: str, found: str, *, without: str, fix: str = "") -> Finding:
    return Finding(name=name, state="missing", found=found, without=without, fix=fix)


def _fault(name: str, found: str, *, fix: str, supported: str = "") -> Finding:
    return Finding(name=name, state="broken", found=found, supported=supported, needed=True, fix=fix)


def _config() -> dict[str, str]:
    lines = (line.split("=", 1) for line in ask("scontrol", "show", "config").text.splitlines() if " = " in line)
    return {name.strip(): value.strip() for name, value in lines}


def _partitions() -> dict[str, dict[str, str]]:
    found = {}
    for line in ask("scontrol", "--oneliner", "show", "partition").text.splitlines():
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        found[words.get("PartitionName", "")] = words
    return found


def _nodes() -> dict[str, str]:
    lines = ask("sinfo", "--noheader", "--Node", "--format=%N|%G").text.splitlines()
    return dict(line.split("|", 1) for line in lines if "|" in line)


def _chosen(profile: ClusterProfile, live: Live) -> list[str]:
    """Partitions that jobs would go to and that exist."""
    names = profile.partition.split(",") if profile.partition else []
    names = names or [name for name, words in live.partitions.items() if words.get("Default") == "YES"]
    return [name for name in names if name in live.partitions]


def _partition(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.partition is None and not _chosen(profile, live):
        yield _fault("partition", "this cluster has no default", fix=f"partition = {_one_of(live.partitions)}")
    for name in profile.partition.split(",") if profile.partition else []:
        if name not in live.partitions:
            near = get_close_matches(name, live.partitions, n=1)
            yield _fault("partition", f"no partition {name}", fix=f"partition = {_one_of(near or live.partitions)}")
    for name in _chosen(profile, live):
        words = live.partitions[name]
        if words.get("State") != "UP":
            fix = "no job starts there until the site brings it up"
            yield _fault("partition", f"{name} is {words.get('State')}", fix=fix)
        else:
            yield _fine("partition", f"{name}: {words.get('TotalNodes')} nodes, at most {words.get('MaxTime')}")


def _one_of(names: object) -> str:
    return " or ".join(f'"{name}"' for name in list(names)[:6])  # type: ignore[call-overload]


def _time(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.time is None:
        return
    for name in _chosen(profile, live):
        longest = live.partitions[name].get("MaxTime", "UNLIMITED")
        if longest not in ("UNLIMITED", "INFINITE") and seconds(profile.time) > seconds(longest):
            fix = f'time = "{longest}": a run that needs longer saves, requeues and goes on'
            yield _fault("time", f"{profile.time} is over {name}'s limit", supported=longest, fix=fix)
        else:
            yield _fine("time", f"{profile.time} is within {name}'s limit of {longest}")


def _nodes_named(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.exclude is not None:
        named = ask("scontrol", "show", "hostnames", profile.exclude).text.split()
        unknown = [name for name in named if name not in live.nodes]
        if unknown or not named:
            fix = "exclude = only nodes that `sinfo -N` lists; sbatch refuses a list with any other"
            yield _fault("exclude", f"no such node: {', '.join(unknown) or profile.exclude}", fix=fix)
        else:
            yield _fine("exclude", f"{len(named)} of {len(live.nodes)} nodes left out")
    if live.nodes:
        name = next(iter(live.nodes))
        shown = ask("scontrol", "--oneliner", "show", "node", name).text
        address = (re.search(r"NodeAddr=(\S+)", shown) or ["", ""])[1]
        if _resolves(name):
            yield _fine("node names", f"{name} resolves")
        elif _resolves(address):
            yield _fine("node names", f"{name} does not resolve here, its NodeAddr {address} does: jobs use that")
        else:
            fix = "ask the site for DNS names of nodes; compute nodes may resolve what this one does not (--run shows)"
            without = "ranks find each other only if the nodes themselves resolve these names"
            yield _note("node names", f"neither {name} nor its NodeAddr resolve here", without=without, fix=fix)


def _resolves(name: str) -> bool:
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _gpus(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    shown = ask("sinfo", "--noheader", "--format=%G|%D", *_in_partitions(profile, live)).text.splitlines()
    kinds = dict(line.strip().split("|", 1) for line in shown if "gpu" in line)
    types = sorted(set(re.findall(r"gpu:([^:(,]*[^:(,\d][^:(,]*)", " ".join(kinds))))
    if profile.gpu_type is not None and profile.gpu_type not in types:
        fix = f"gpu_type = {_one_of(types)}" if types else "leave gpu_type out: Slurm knows no types of GPUs there"
        yield _fault("GPUs", f"no node there has GPUs of type {profile.gpu_type}", fix=fix)
    elif kinds:
        yield _fine("GPUs", "; ".join(f"{count} nodes with {gres.split('(')[0]}" for gres, count in kinds.items()))
        yield from _gpu_request(profile, live)
    else:
        fix = "name a partition that has some: `sinfo -o '%P %G'`"
        yield _note("GPUs", "no node here has any", without="runs with gpus_per_node=0 alone", fix=fix)


def _gpu_request(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Whether one GPU may be asked for in the profile's way."""
    one = Allocation(nodes=1, tasks_per_node=1, cpus_per_task=None, gpus_per_node=1)
    asked = [f"--{name}={value}" for name, value in gpu_options(one, profile).items()]
    said = _test_only(*_in_partitions(profile, live), *asked)
    if said.ok:
        yield _fine("gpu_request", " ".join(asked))
    else:
        fix = 'gpu_request = "gres", "gpus-per-node" or "gpus-per-task", as the site\'s pages say'
        yield _fault("gpu_request", f"{' '.join(asked)}: {_reason(said)}", fix=fix)


def _in_partitions(profile: ClusterProfile, live: Live) -> list[str]:
    names = _chosen(profile, live)
    return [f"--partition={','.join(names)}"] if names else []


def _constraint(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.constraint is not None:
        yield _tried("constraint", profile.constraint, profile, live, fix="`sinfo -o '%N %f'` lists nodes' features")


def _reservation(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.reservation is not None:
        fix = "`scontrol show reservation` lists them, with their users and times"
        yield _tried("reservation", profile.reservation, profile, live, fix=fix)


def _tried(name: str, value: str, profile: ClusterProfile, live: Live, *, fix: str) -> Finding:
    """Whether sbatch would take one option; nothing is queued."""
    said = _test_only(*_in_partitions(profile, live), f"--{name}={value}")
    return _fine(name, value) if said.ok else _fault(name, f"{value}: {_reason(said)}", fix=fix)


def _test_only(*options: str) -> Answer:
    return ask("sbatch", "--test-only", "--time=1", *options, "--wrap=true")


def _reason(said: Answer) -> str:
    for words in ("sbatch: error: ", "sbatch: ", "allocation failure: "):
        said = Answer(said.ok, said.first.removeprefix(words))
    return said.first or "sbatch refuses it"


def _accounts(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if live.config.get("AccountingStorageType", "").endswith("/slurmdbd"):
        said = ask("sacct", "--noheader", "--jobs=0")
        if said.ok:
            yield _fine("accounting", "sacct answers")
        else:
            yield _note("accounting", said.first, without="states come from heartbeats, squeue and scontrol")
        yield from _association(profile)
        return
    yield _note("accounting", "not used by this cluster", without="states come from heartbeats, squeue and scontrol")
    for name, value in (("account", profile.account), ("qos", profile.qos)):
        if value is not None:
            without = f"Slurm takes any name, so {value} means nothing here"
            yield _note(name, "cannot be checked without accounting", without=without, fix=f"leave {name} out")


def _association(profile: ClusterProfile) -> Iterator[Finding]:
    user = getpass.getuser()
    said = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account,qos")
    rows = [line.split("|") for line in said.lines if "|" in line]
    accounts = sorted({row[0] for row in rows})
    qos = sorted({name for row in rows for name in row[1].split(",") if name})
    for name, value, known in (("account", profile.account, accounts), ("qos", profile.qos, qos)):
        if value is None:
            continue
        if value in known:
            yield _fine(name, value)
        else:
            names = (
                f"{name} = {_one_of(known)}"
                if known
                else f"ask the site for {'an' if name == 'account' else 'a'} {name}"
            )
            yield _fault(name, f"{user} may not use {value}", fix=names)


def _options(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Each further sbatch option alone, so that the one at fault is named."""
    for name, value in profile.sbatch.items():
        if value is False:
            continue
        option = f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        said = _test_only(*_in_partitions(profile, live), option)
        if said.ok:
            yield _fine(f"sbatch {name}", str(value))
        else:
            yield _fault(f"sbatch {name}", f"{option}: {_reason(said)}", fix="`man sbatch` lists options and values")


def _settings(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """What Slurm is set to, and what that means for a run."""
    known: dict[str, Callable[[str], str]] = {
        "MaxArraySize": lambda value: f"{value}: larger sweeps are split over several arrays",
        "JobRequeue": lambda value: "jobs may requeue" if value == "1" else "off by default; our jobs ask for it",
        "PreemptMode": lambda value: f"{value}, by {live.config.get('PreemptType', '?')}",
        "PrologFlags": lambda value: "none" if value == "(null)" else value,
    }
    for name, meaning in known.items():
        if name in live.config:
            yield _fine(name, meaning(live.config[name]))
    kill_wait = live.config.get("KillWait", "")
    found = re.match(r"\d+", kill_wait)
    if found and int(found[0]) < _SAVE_S:
        without = "a cancelled or preempted run goes on from the checkpoint before, if its own takes longer than this"
        yield _note("KillWait", f"{kill_wait} to save in", without=without, fix="ask the site for 60 or more")
    elif found:
        yield _fine("KillWait", f"{kill_wait} to save in after a cancel or a preemption")
    expire = re.search(r"cred_expire=(\d+)", live.config.get("AuthInfo", ""))
    yield _fine("requeue delay", f"{int(expire[1]) + 1 if expire else 121} s until a requeued job may start again")
