"""Slurm's own configuration, queried once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from megabatch.doctor.commands import run_command
from megabatch.slurm.profile import ClusterProfile
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Live:
    """Slurm's own report, fetched once."""

    config: dict[str, str]
    """`scontrol show config`."""
    partitions: dict[str, dict[str, str]]
    """`scontrol show partition`, by name."""
    nodes: dict[str, str]
    """Generic resources of each node, by name."""


def live_cluster() -> Live:
    """Asks for all of it."""
    return Live(_config(), _partitions(), _nodes())


def _config() -> dict[str, str]:
    lines = (
        line.split("=", 1) for line in run_command("scontrol", "show", "config").text.splitlines() if " = " in line
    )
    return {name.strip(): value.strip() for name, value in lines}


def _partitions() -> dict[str, dict[str, str]]:
    found = {}
    for line in run_command("scontrol", "--oneliner", "show", "partition").text.splitlines():
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        found[words.get("PartitionName", "")] = words
    return found


def _nodes() -> dict[str, str]:
    lines = run_command("sinfo", "--noheader", "--Node", "--format=%N|%G").text.splitlines()
    return dict(line.split("|", 1) for line in lines if "|" in line)


def chosen(profile: ClusterProfile, live: Live) -> list[str]:
    """The existing partitions among those that jobs would use."""
    names = profile.partition.split(",") if profile.partition else []
    names = names or [name for name, words in live.partitions.items() if words.get("Default") == "YES"]
    return [name for name in names if name in live.partitions]


def in_partitions(profile: ClusterProfile, live: Live) -> list[str]:
    names = chosen(profile, live)
    return [f"--partition={','.join(names)}"] if names else []


def one_of(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in islice(names, 6))
