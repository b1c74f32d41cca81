"""Judges which nodes are bad, and whether a run may exclude them: pure arithmetic over what came."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megabatch.trainer.preflight.node import Bad


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Shares of the median of all peers below which a device or a link is an outlier."""

    matmul: float
    link: float
    clock_s: float = 5.0
    """Clocks further apart confuse heartbeats and files' times."""


GPU_BOUNDS = Bounds(matmul=0.8, link=0.5)
CPU_BOUNDS = Bounds(matmul=0.2, link=0.1)
"""Wide: other jobs share a node's cores."""

Report = Mapping[str, Any]
"""What a node sends: `node`, `faults` (check, value, rule), `matmul` (see `speed.matmul`), `clock_s`."""


def bad_nodes(
    reports: Mapping[int, Report], links: Sequence[Mapping[str, Any]], *, count: int, bounds: Bounds
) -> dict[int, list[Bad]]:
    """What is wrong with each node that differs from the others, by node index."""
    found: defaultdict[int, list[Bad]] = defaultdict(list)
    for index in range(count):
        report = reports.get(index)
        if report is None:
            found[index].append(Bad("answer", "none", "reports before the time limit"))
            continue
        found[index] += [Bad(*words) for words in report["faults"]]
        ahead_s = report.get("clock_s", 0.0)
        if abs(ahead_s) > bounds.clock_s:
            rule = f"within {bounds.clock_s:g} s of the first node's"
            found[index].append(Bad("clock", f"{ahead_s:+.1f} s", rule))
    for index, bad in _slow_devices(reports, bounds):
        found[index].append(bad)
    for index, bad in _slow_links(links, bounds):
        found[index].append(bad)
    return {index: faults for index, faults in sorted(found.items()) if faults}


def _slow_devices(reports: Mapping[int, Report], bounds: Bounds) -> Iterator[tuple[int, Bad]]:
    """Compared with all devices of the same name; absolute numbers say nothing about a cluster nobody knows."""
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    for report in reports.values():
        for device in report.get("matmul", ()):
            if "tflops" in device:
                speeds[device["name"]].append(device["tflops"])
    for index, report in reports.items():
        for number, device in enumerate(report.get("matmul", ())):
            where = f"{device['name']} {number}"
            if "error" in device:
                yield index, Bad("matmul", f"{where}: {device['error']}", "multiplies two matrices")
                continue
            usual = median(speeds[device["name"]])
            if device["tflops"] < bounds.matmul * usual:
                value = f"{where}: {device['tflops']:.3g} TFLOP/s"
                yield index, Bad("matmul", value, f"at least {bounds.matmul:g} of its peers' {usual:.3g}")


def _slow_links(links: Sequence[Mapping[str, Any]], bounds: Bounds) -> Iterator[tuple[int, Bad]]:
    """Names the node that most bad pairs have in common, then the next, until every bad pair is explained.

    A bad pair of two nodes that are otherwise as good is put down to the later one: leaving out either mends it.
    """
    best: dict[int, float] = {}
    for link in links:
        for index in link["pair"]:
            best[index] = max(best.get(index, 0.0), link.get("gb_per_s", 0.0))
    # each node's best: two bad nodes of six are in more than half of all pairs
    usual = median(best.values()) if best else 0.0
    bad = [link for link in links if "error" in link or link["gb_per_s"] < bounds.link * usual]
    while bad:
        together = Counter(index for link in bad for index in link["pair"])
        worst = max(together, key=lambda index: (together[index], index))
        mine = [link for link in bad if worst in link["pair"]]
        bad = [link for link in bad if worst not in link["pair"]]
        peers = sorted({index for link in mine for index in link["pair"]} - {worst})
        said = {_said(link) for link in mine}
        value = f"with node {', '.join(map(str, peers))} of the job: {'; '.join(sorted(said))}"
        rule = f"at least {bounds.link:g} of the usual {usual:.3g} GB/s" if usual else "two nodes reduce together"
        yield worst, Bad("link", value, rule)


def _said(link: Mapping[str, Any]) -> str:
    return str(link["error"]) if "error" in link else f"{link['gb_per_s']:.3g} GB/s"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the batch script does next."""

    word: str
    """`ok`, `exclude` or `fail`."""
    why: str = ""


def verdict(bad: int, *, count: int, excluded_before: int, max_bad_nodes: int) -> Verdict:
    """Bad nodes are left out while they are few; what most nodes have in common is a fault of the job or the site."""
    if not bad:
        return Verdict("ok")
    if count > 1 and bad * 2 > count:
        why = f"{bad} of {count} nodes fail: that is the site's or the job's fault, not a node's"
        return Verdict("fail", why)
    if excluded_before + bad > max_bad_nodes:
        before = f" after {excluded_before} before" if excluded_before else ""
        return Verdict("fail", f"{bad} bad nodes{before}, and resources.max_bad_nodes={max_bad_nodes} may be excluded")
    return Verdict("exclude")
