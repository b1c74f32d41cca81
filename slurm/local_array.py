"""Running many jobs on this machine, a few at a time: what a job array is to a cluster."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import StopRequests, run_local
from megabatch.slurm.ports import free_port_block
from megabatch.slurm.profile import ClusterProfile

Report = Callable[[JobSpec, str], None]


def run_local_array(
    jobs: Sequence[JobSpec], profile: ClusterProfile, *, max_parallel: int, report: Report
) -> list[int]:
    """Runs each job as `run_local` does, at most `max_parallel` at a time, and returns their exit codes in order.

    On a stop request (SIGINT, SIGTERM) running jobs save and stop, and no more start: jobs not started also return
    `ExitCode.REQUEUE`. A second request kills. Each running job has its own GPUs, which limits how many run at once.

    Args: `report` is called when each job starts and ends, from several threads, one at a time.
    """
    places = _Places(jobs, max_parallel)
    lock = threading.Lock()

    def report_one(job: JobSpec, text: str) -> None:
        with lock:
            report(job, text)

    with StopRequests() as requests, ThreadPoolExecutor(places.count) as pool:

        def run_one(job: JobSpec) -> int:
            if requests.count:
                return ExitCode.REQUEUE
            with places.taken() as variables, open(os.devnull, "wb") as nowhere:
                report_one(job, "started")
                try:
                    code = run_local(job, profile, terminal=nowhere, requests=requests, variables=variables)
                except LaunchError as error:
                    report_one(job, str(error))
                    return ExitCode.FAILED
                report_one(job, _ended(code))
                return code

        return list(pool.map(run_one, jobs))


def _ended(code: int) -> str:
    words = {ExitCode.DONE.value: "done", ExitCode.REQUEUE.value: "stopped and saved"}
    return words.get(code, f"failed with exit code {code}")


class _Places:
    """Slots for jobs that run at the same time, each with a port and GPUs of its own."""

    def __init__(self, jobs: Sequence[JobSpec], max_parallel: int) -> None:
        ranks = max((job.world_size for job in jobs), default=1)
        self._devices = device_shares(ranks) if any(job.gpus_per_node for job in jobs) else []
        self.count = max(1, min(max_parallel, len(jobs), len(self._devices) or max_parallel))
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(self.count):
            self._free.put(place)
        self._ports: set[int] = set()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """The variables that tell a job's ranks their slot."""
        place, port = self._free.get(), self._new_port()
        try:
            devices = {"CUDA_VISIBLE_DEVICES": self._devices[place]} if self._devices else {}
            yield {"MASTER_PORT": str(port), **devices}
        finally:
            self._ports.discard(port)
            self._free.put(place)

    def _new_port(self) -> int:
        """A port that no other job of ours is about to use."""
        with self._lock:
            port = next(port for port in iter(free_port_block, None) if port not in self._ports)
            self._ports.add(port)
        return port


def device_shares(ranks: int, *, visible: Sequence[str] | None = None) -> list[str]:
    """The GPUs that this process sees, in lists of `ranks` each, in the form of CUDA_VISIBLE_DEVICES."""
    if visible is None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*"))
        visible = given.split(",") if given else [str(number) for number in found]
    return [",".join(visible[first : first + ranks]) for first in range(0, len(visible) - ranks + 1, ranks)]
