"""Comparing a cluster profile with the live cluster: what a job of this profile would be refused for, before it is."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches

from megabatch.config.walltime import seconds
from megabatch.doctor.commands import run_command
from megabatch.doctor.finding import Finding, fault, fine, note
from megabatch.doctor.live import Live, chosen, live_cluster, one_of
from megabatch.doctor.requests import account_and_qos, accounting, constraint, gpus, options, reservation
from megabatch.slurm.profile import ClusterProfile

_SAVE_S = 30


def examine_cluster(profile: ClusterProfile) -> list[Finding]:
    """One finding per thing that the profile names or a run needs; stops early if Slurm does not answer."""
    said = run_command("scontrol", "ping")
    if not said.ok or "UP" not in said.text:
        fix = "log in to a node of the cluster, or check SLURM_CONF; for a private cluster: make cluster"
        return [fault("Slurm controller", said.first or "no answer", fix=fix)]
    live = live_cluster()
    return [fine("Slurm controller", "answers"), *(finding for check in _CHECKS for finding in check(profile, live))]


def _partition(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.partition is None and not chosen(profile, live):
        yield fault("partition", "this cluster has no default", fix=f"partition = {one_of(live.partitions)}")
    for name in profile.partition.split(",") if profile.partition else []:
        if name not in live.partitions:
            near = get_close_matches(name, live.partitions, n=1)
            yield fault("partition", f"no partition {name}", fix=f"partition = {one_of(near or live.partitions)}")
    for name in chosen(profile, live):
        words = live.partitions[name]
        if words.get("State") != "UP":
            fix = "no job starts there until the site enables it"
            yield fault("partition", f"{name} is {words.get('State')}", fix=fix)
        else:
            yield fine("partition", f"{name}: {words.get('TotalNodes')} nodes, at most {words.get('MaxTime')}")


def _time(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.time is None:
        return
    for name in chosen(profile, live):
        longest = live.partitions[name].get("MaxTime", "UNLIMITED")
        if longest not in ("UNLIMITED", "INFINITE") and seconds(profile.time) > seconds(longest):
            fix = f'time = "{longest}": a longer run saves, requeues and resumes'
            yield fault("time", f"{profile.time} is over {name}'s limit", supported=longest, fix=fix)
        else:
            yield fine("time", f"{profile.time} is within {name}'s limit of {longest}")


def _nodes_named(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    if profile.exclude is not None:
        named = run_command("scontrol", "show", "hostnames", profile.exclude).text.split()
        unknown = [name for name in named if name not in live.nodes]
        if unknown or not named:
            fix = "exclude = only nodes that `sinfo -N` lists; sbatch refuses a list with any other name"
            yield fault("exclude", f"no such node: {', '.join(unknown) or profile.exclude}", fix=fix)
        else:
            yield fine("exclude", f"{len(named)} of {len(live.nodes)} nodes excluded")
    if live.nodes:
        name = next(iter(live.nodes))
        shown = run_command("scontrol", "--oneliner", "show", "node", name).text
        address = (re.search(r"NodeAddr=(\S+)", shown) or ["", ""])[1]
        if _resolves(name):
            yield fine("node names", f"{name} resolves")
        elif _resolves(address):
            yield fine("node names", f"{name} does not resolve here, but its NodeAddr {address} does; jobs use that")
        else:
            fix = "ask the site for DNS names of nodes; compute nodes may resolve more than this one (--run checks)"
            without = "ranks find each other only if the nodes themselves resolve these names"
            yield note("node names", f"neither {name} nor its NodeAddr resolve here", without=without, fix=fix)


def _resolves(name: str) -> bool:
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _settings(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Slurm's settings, and what they mean for a run."""
    known: dict[str, Callable[[str], str]] = {
        "MaxArraySize": lambda value: f"{value}: larger sweeps are split over several arrays",
        "JobRequeue": lambda value: "jobs may requeue" if value == "1" else "off by default; our jobs request it",
        "PreemptMode": lambda value: f"{value}, by {live.config.get('PreemptType', '?')}",
        "PrologFlags": lambda value: "none" if value == "(null)" else value,
    }
    for name, meaning in known.items():
        if name in live.config:
            yield fine(name, meaning(live.config[name]))
    kill_wait = live.config.get("KillWait", "")
    found = re.match(r"\d+", kill_wait)
    if found and int(found[0]) < _SAVE_S:
        without = "a cancelled or preempted run resumes from the previous checkpoint if saving takes longer than this"
        yield note("KillWait", f"{kill_wait} to save in", without=without, fix="ask the site for 60 or more")
    elif found:
        yield fine("KillWait", f"{kill_wait} to save in after a cancel or a preemption")
    expire = re.search(r"cred_expire=(\d+)", live.config.get("AuthInfo", ""))
    yield fine("requeue delay", f"{int(expire[1]) + 1 if expire else 121} s until a requeued job may start again")


def _prepare(profile: ClusterProfile, live: Live) -> Iterator[Finding]:
    """Checks the partition of `megabatch prepare --submit` in the same way as that of the runs."""
    if profile.prepare is None:
        return
    # the profile's own account was already checked
    other = replace(profile.of_preparation(), account=profile.prepare.account)
    for check in (_partition, _time, constraint, account_and_qos):
        for finding in check(other, live):
            yield replace(finding, name=f"prepare.{finding.name}")


_CHECKS: tuple[Callable[[ClusterProfile, Live], Iterator[Finding]], ...] = (
    _partition,
    _time,
    _nodes_named,
    gpus,
    constraint,
    reservation,
    accounting,
    account_and_qos,
    options,
    _prepare,
    _settings,
)
