"""All benchmarks: `python tests/bench/run.py [NAME …] [--json PATH]`; without names, all but the demo.

Comparisons are ratios taken side by side in one process, so that they mean something on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

import aligned_peers
import files
import giants
import launch
import lora
import negatives
import peers
import plan
import requeue
import startup
import status
import sweeps
import tokenise
from measure import Figure, in_trainer_processes


def _in_trainer(script: str, *, world_size: int = 1) -> Callable[[], list[Figure]]:
    def measure() -> list[Figure]:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            return in_trainer_processes(script, Path(folder), world_size=world_size)

    return measure


BENCHMARKS: dict[str, Callable[[], list[Figure]]] = {
    "dry_run": launch.dry_run,
    "array": sweeps.array,
    "import": launch.recipe_import,
    "help": launch.command_help,
    "render": launch.rendering,
    "plan": plan.plan,
    "step": _in_trainer("step.py"),
    "context": _in_trainer("context.py", world_size=2),
    "lora_step": _in_trainer("lora_step.py"),
    "grpo_round": _in_trainer("grpo_round.py"),
    "server_sync": _in_trainer("server_sync.py"),
    "negatives": negatives.negatives,
    "aligned_peers": aligned_peers.aligned_peers,
    "gkd": _in_trainer("gkd.py"),
    "checkpoint": _in_trainer("checkpoint.py"),
    "convert": _in_trainer("convert.py"),
    "files": files.files,
    "tokenise": tokenise.tokenise,
    "lora": lora.lora,
    "giants": giants.giants,
    "startup": startup.startup,
    "status": status.status,
    "requeue": requeue.requeue,
    "peers": peers.peers,
    "demo": startup.demo,
}
ON_REQUEST = {"demo", "peers", "aligned_peers", "server_sync"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    record: dict[str, Any] = {**_machine(), "benchmarks": {}}
    broken: list[str] = []
    for name in options.names or [name for name in BENCHMARKS if name not in ON_REQUEST]:
        before = os.getloadavg()[0]
        try:
            figures = BENCHMARKS[name]()
        except (Exception, SystemExit) as e:  # one that broke hides none of the others
            broken.append(name)
            print(f"{name} failed: {e}", file=sys.stderr, flush=True)
            continue
        record["benchmarks"][name] = {"load_before": before, "figures": [asdict(figure) for figure in figures]}
        for figure in figures:
            print(_line(figure), flush=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if broken:
        print(f"error: these benchmarks failed: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def _line(figure: Figure) -> str:
    target = "" if figure.target is None else f"<= {figure.target:g}"
    verdict = "" if figure.target is None else "MISSED" if figure.missed else "met"
    return f"{figure.name:42} {figure.value:9.3f} {figure.unit:4} {target:8} {verdict:7} {figure.note}".rstrip()


def _machine() -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
