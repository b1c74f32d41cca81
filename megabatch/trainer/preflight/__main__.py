"""One node's part of the preflight: `python -m megabatch.trainer.preflight RUN_DIR …`, one process on each node.

Node 0 judges and writes the verdict; the batch script, which can talk to Slurm, acts on it.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch.errors import LaunchError
from megabatch.run_directory import FIRST_NODE_SILENT, RunDirectory, write_atomic
from megabatch.trainer.preflight import node, speed
from megabatch.trainer.preflight.exchange import Place, Values, gather
from megabatch.trainer.preflight.judge import CPU_BOUNDS, GPU_BOUNDS, Verdict, bad_nodes, verdict
from megabatch.trainer.preflight.node import Bad

_LIMIT_S = 300
"""A process that hangs for longer is ended wherever it hangs."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 once this node's part is done, whatever the verdict; FIRST_NODE_SILENT without one."""
    options = _parse(arguments)
    faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
    environment = os.environ
    try:
        place = Place(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            int(environment["SLURM_PROCID"]),
            tuple(range(int(environment["SLURM_NTASKS"]))),
        )
        name = environment["SLURMD_NODENAME"]
    except KeyError as error:
        raise LaunchError(f"{error.args[0]} is not set: the preflight runs as a step of a Slurm job") from error
    try:
        asyncio.run(_examine(options, place, name))
    except (OSError, TimeoutError, ValueError) as error:
        print(f"megabatch: preflight on {name}: the first node does not answer: {error!r}", file=sys.stderr)
        return FIRST_NODE_SILENT
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megabatch.trainer.preflight", description=__doc__)
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--level", choices=("light", "full"), required=True)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs asked for on each node")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the run on each node")
    parser.add_argument("--local_cache", type=Path, required=True)
    parser.add_argument("--max_bad_nodes", type=int, required=True)
    parser.add_argument("--answer_s", type=float, required=True, help="how long a node may take")
    return parser.parse_args(arguments)


async def _examine(options: argparse.Namespace, place: Place, name: str) -> None:
    start = time.monotonic()
    store = speed.open_store(place.address, 0, leads=True) if options.level == "full" and place.index == 0 else None
    reports: Values = {}
    measured: list[Mapping[str, Any]] = []

    def invite(values: Values) -> dict[str, Any]:
        reports.update(values)
        return {"members": sorted(values), "port": store.port if store is not None else 0}

    def judge(values: Values) -> None:
        measured.extend(link for links in values.values() for link in links)
        _decide(options, place, reports, measured, seconds=time.monotonic() - start)

    own = await asyncio.to_thread(_report, options, name)
    invitation = await gather(place, own, invite, timeout_s=options.answer_s)
    if options.level == "light":
        if place.index == 0:
            judge({})
        return
    links: list[dict[str, Any]] = []
    if place.index in invitation["members"]:
        store = store or speed.open_store(place.address, invitation["port"], leads=False)
        links = await asyncio.to_thread(speed.links, store, place.index, invitation["members"], gpus=options.gpus)
    await gather(replace(place, members=tuple(invitation["members"])), links, judge, timeout_s=options.answer_s)


def _report(options: argparse.Namespace, name: str) -> dict[str, Any]:
    found = node.faults(gpus=options.gpus, local_cache=options.local_cache, ranks=options.ranks)
    faults = [[bad.check, bad.value, bad.rule] for bad in found]
    # a GPU that nvidia-smi has lost could hang whoever touches it
    lost = any(bad.check == "gpus" for bad in found)
    matmul = [] if options.level == "light" or lost else speed.matmul(gpus=options.gpus)
    return {"node": name, "faults": faults, "matmul": matmul}


def _decide(
    options: argparse.Namespace, place: Place, reports: Values, links: list[Mapping[str, Any]], *, seconds: float
) -> None:
    """Writes what was measured, the record of bad nodes, and last the verdict."""
    run = RunDirectory(options.run_directory)
    bounds = GPU_BOUNDS if options.gpus else CPU_BOUNDS
    bad = bad_nodes(reports, links, count=len(place.members), bounds=bounds)
    names = {index: _name(reports, index) for index in range(len(place.members))}
    decided = verdict(
        len(bad),
        count=len(place.members),
        excluded_before=len(_excluded_before(run)),
        max_bad_nodes=options.max_bad_nodes,
    )
    marker = f"preflight.{os.environ['MEGABATCH_JOB_ID']}.{os.environ['MEGABATCH_ATTEMPT']}"
    said = {"seconds": round(seconds, 3), "reports": list(reports.values()), "links": links}
    write_atomic(run.logs / f"{marker}.json", json.dumps(said, indent=1) + "\n")
    _record(run, {names[index]: faults for index, faults in bad.items()}, excluded=decided.word == "exclude")
    _say(bad, names, decided, seconds=seconds)
    write_atomic(run.logs / marker, f"{decided.word} {','.join(names[index] for index in bad)}\n")


def _name(reports: Values, index: int) -> str:
    """A node that did not answer is known by its place in Slurm's list alone."""
    if index in reports:
        return str(reports[index]["node"])
    return os.environ["MEGABATCH_NODES"].split()[index]


def _excluded_before(run: RunDirectory) -> set[str]:
    """Nodes that this job has left out already."""
    try:
        lines = [json.loads(line) for line in run.bad_nodes.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return set()
    job_id = os.environ["MEGABATCH_JOB_ID"]
    return {str(line["node"]) for line in lines if line["excluded"] and line["job_id"] == job_id}


def _record(run: RunDirectory, bad: Mapping[str, list[Bad]], *, excluded: bool) -> None:
    facts = {
        "time": time.time(),
        "job_id": os.environ["MEGABATCH_JOB_ID"],
        "attempt": int(os.environ["MEGABATCH_ATTEMPT"]),
    }
    lines = [
        {**facts, "node": name, "check": fault.check, "value": fault.value, "rule": fault.rule, "excluded": excluded}
        for name, faults in bad.items()
        for fault in faults
    ]
    if lines:
        with open(run.bad_nodes, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _say(bad: Mapping[int, list[Bad]], names: Mapping[int, str], decided: Verdict, *, seconds: float) -> None:
    for index, faults in bad.items():
        for fault in faults:
            print(f"megabatch: preflight: {names[index]}: {fault.check}: {fault.value} ({fault.rule})")
    if decided.why:
        print(f"megabatch: preflight: {decided.why}")
    print(f"megabatch: preflight of {len(names)} nodes: {decided.word}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a library that hangs must not hold up the job
