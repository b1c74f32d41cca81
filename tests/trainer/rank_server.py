"""Runs a function on every rank of a small world, cheaply.

Importing torch and megatron-core costs seconds, so one server process imports them once and forks the ranks of each
world from itself. `RankServer.run` takes a function defined in a test file; each rank calls it with the same keyword
arguments and its result comes back in rank order.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megabatch.slurm.ports import free_port_block

_IMPORTED = (
    "megabatch.trainer.loop",
    "pytest",
    "safetensors.torch",
    "torch.nn.attention.varlen",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_python",
)


class RankServer:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self._process.start()

    def run(
        self, function: Callable[..., Any], *, world_size: int, timeout_s: float = 500, **arguments: Any
    ) -> list[Any]:
        """Results of `function(**arguments)` on each rank; tracebacks as RuntimeError if one failed."""
        source = (str(Path(sys.modules[function.__module__].__file__ or "").resolve()), function.__name__)
        self._connection.send((source, world_size, timeout_s, arguments))
        while not self._connection.poll(1):
            if not self._process.is_alive():
                raise RuntimeError("the rank server died")
        failed, results = self._connection.recv()
        if failed:
            raise RuntimeError(failed)
        return results

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    from megabatch.trainer import megatron_cpu

    megatron_cpu.adapt()
    # what every run imports, once rather than in each rank of each world
    for name in _IMPORTED:
        importlib.import_module(name)
    while True:
        try:
            source, world_size, timeout_s, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(_world(source, world_size, timeout_s, arguments))


def _world(
    source: tuple[str, str], world_size: int, timeout_s: float, arguments: dict[str, Any]
) -> tuple[str, list[Any]]:
    port = free_port_block()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pids = [_fork(source, rank, world_size, port, Path(folder), arguments) for rank in range(world_size)]
        _wait(pids, timeout_s)
        failed, results = "", []
        for rank in range(world_size):
            file = Path(folder) / f"{rank}.pickle"
            kind, value = pickle.loads(file.read_bytes()) if file.exists() else ("error", "killed: hung or crashed")
            if kind == "error":
                failed += f"rank {rank} of {world_size}: {value}\n"
            results.append(value)
        return failed, results


def _fork(source: tuple[str, str], rank: int, world: int, port: int, folder: Path, arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 0
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        outcome = ("ok", _load(*source)(**arguments))
    except BaseException:
        outcome, status = ("error", traceback.format_exc()), 1
    (folder / f"{rank}.tmp").write_bytes(pickle.dumps(outcome))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pickle")
    os._exit(status)


def _load(path: str, name: str) -> Callable[..., Any]:
    module = sys.modules.get(f"ranks_{Path(path).stem}")
    if module is None:
        spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        sys.path.insert(0, str(Path(path).parent))
        spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _wait(pids: list[int], timeout_s: float) -> None:
    """Until all ranks ended; a failed rank gives the others ten seconds before they are killed."""
    deadline, left = time.monotonic() + timeout_s, set(pids)
    while left and time.monotonic() < deadline:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status:
                    deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
