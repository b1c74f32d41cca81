"""Run directories as launcher and trainer leave them, for what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.run_directory import RunDirectory


@dataclass(frozen=True)
class MadeRun:
    """A run of two nodes with four GPUs each."""

    files: RunDirectory

    @staticmethod
    def at(folder: Path, *, name: str = "made", **recipe: Any) -> MadeRun:
        files = RunDirectory(folder)
        files.logs.mkdir(parents=True)
        resources = {"nodes": 2, "gpus_per_node": 4}
        values = {"name": name, "training": {"train_iters": 100}, "resources": resources} | recipe
        layout = {"world_size": 8, "tp": 2, "dp": 4}
        files.run_json.write_text(json.dumps({"recipe": values, "layout": layout, "run_dir": str(folder)}))
        return MadeRun(files)

    def line(self, **words: object) -> None:
        with open(self.files.jobs, "a") as file:
            file.write(json.dumps(words) + "\n")

    def submitted(self, job_id: str = "7", time: float = 0) -> None:
        self.line(job_id=job_id, time=time, cluster=None)

    def started(self, attempt: int, start: float, *, job_id: str = "7", nodes: str = "n[1-2]") -> None:
        self.line(job_id=job_id, attempt=attempt, start=start, nodes=nodes)

    def ended(self, attempt: int, exit_code: int, time: float, *, job_id: str = "7") -> None:
        self.line(job_id=job_id, attempt=attempt, exit_code=exit_code, time=time)

    def failed_first(self, rank: int, exit_code: int, node: str, *, attempt: int = 0, job_id: str = "7") -> None:
        self.files.marker("failed", job_id, attempt).write_text(f"{rank} {exit_code} {node}\n")

    def bad_node(self, node: str, check: str, *, attempt: int = 0, excluded: bool = True, job_id: str = "7") -> None:
        words = {"time": 1000, "job_id": job_id, "attempt": attempt, "node": node, "check": check}
        with open(self.files.bad_nodes, "a") as file:
            file.write(json.dumps(words | {"value": "3", "rule": "0", "excluded": excluded}) + "\n")

    def beat(self, **words: object) -> None:
        self.files.heartbeat.write_text(json.dumps({"train_iters": 100} | words))

    def batch(self, text: str, *, job_id: str = "7") -> None:
        self.files.batch_log(job_id).write_text(text)

    def log(self, rank: int, text: str, *, attempt: int = 0) -> None:
        self.files.rank_log(rank, attempt).write_text(text)

    def steps(self, steps: Sequence[tuple[int, float]], **more: object) -> None:
        """Appends a training line for each (step, seconds of all steps so far)."""
        with open(self.files.metrics, "a") as file:
            for step, trained_s in steps:
                line = {"kind": "train", "step": step, "loss": 10 / step, "grad_norm": 1.0, "learning_rate": 1e-4}
                line |= {"tokens_per_s": 500.0, "trained_s": trained_s, "eta_s": (100 - step) * 2.0}
                file.write(json.dumps(line | more) + "\n")
