"""Runs a function on every rank of a small world, cheaply.

Importing torch and megatron-core costs seconds, so one server process imports them once and forks the ranks of each
world from itself. `RankServer.run` takes a function defined in a test file; each rank calls it with the same keyword
arguments and its result comes back in rank order.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import site
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megabatch.slurm.ports import free_port_block

_IMPORTED = (
    "megabatch.entry.model",
    "megabatch.rollout.local.keeping",
    "megabatch.trainer.loop",
    "pytest",
    "safetensors.torch",
    "torch.nn.attention.varlen",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.tokenization_python",
)


ONE_GPU = os.environ.get("MEGABATCH_TEST_SHARE_GPU") == "1"
"""Whether all ranks of a world use the first GPU. NCCL refuses two ranks of a host on one GPU, so each rank names a
host of its own, and they exchange through sockets: this shows the calls, not their speed."""


class RankServer:
    def __init__(self, *, cuda: bool = False, python: str | None = None, imported: Sequence[str] = ()) -> None:
        """Args: cuda: whether ranks use GPUs; else they are on CPUs, whatever the machine has; python: another
        interpreter of the same release, for ranks with its packages; imported: modules that the ranks need besides
        the trainer's."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._tokens = tempfile.TemporaryDirectory(prefix="rank-tokens-")
        given = (theirs, cuda, tuple(imported), Path(self._tokens.name))
        self._process = context.Process(target=_serve, args=given, daemon=False)
        try:
            multiprocessing.set_executable(python or sys.executable)
            self._process.start()
        finally:
            multiprocessing.set_executable(sys.executable)

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
        self._tokens.cleanup()


def place(rank: int, world: int, port: int, *, cuda: bool) -> dict[str, str]:
    """The environment of a rank that differs from that of others."""
    shared = cuda and ONE_GPU
    found = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0 if shared else rank, "MASTER_PORT": port}
    if shared:
        found |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_NCHANNELS": 2}
        found |= {f"NCCL_{way}_DISABLE": 1 for way in ("P2P", "SHM", "IB")}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in found.items()}}


def _serve(connection: Connection, cuda: bool, imported: tuple[str, ...], tokens: Path) -> None:
    if (own := sysconfig.get_path("purelib")) not in sys.path:  # multiprocessing gave it its parent's path
        site.addsitedir(own)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if cuda:
        # a process that initialised CUDA, as torch's other check for a device does, cannot fork ranks that use it
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ.update(CUDA_DEVICE_MAX_CONNECTIONS="1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else every rank starts a pool of compilers
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    if not cuda:
        from megabatch.trainer import megatron_cpu

        megatron_cpu.adapt()
    # what every run imports, once rather than in each rank of each world; Transformer Engine initialises CUDA when it
    # is imported, and ranks forked after that could not use it
    if not (cuda and importlib.util.find_spec("transformer_engine")):
        for name in (*_IMPORTED, *imported):
            importlib.import_module(name)
    _share_tokens(tokens)
    gc.collect()
    gc.freeze()  # else each rank's collector searches what was imported, and so copies its pages
    while True:
        try:
            source, world_size, timeout_s, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)  # threads of what was imported must not hold it up
        connection.send(_world(source, world_size, timeout_s, arguments, cuda))


def _share_tokens(folder: Path) -> None:
    """Lets a run copy the token cache that an earlier one has written of the same files under the same name, a digest
    of all that decides the tokens: where a user's `preprocess` makes the rows, the processes that it runs in cost more
    than the run."""
    from megabatch.data.cache import cache_files
    from megabatch.data.cache.token_cache import TokenCache

    build, write, files = TokenCache.build, cache_files.write, [""]

    def built(sources: Sequence[Any], *arguments: Any, **keywords: Any) -> Path:
        files[0] = hashlib.sha256(repr([source.paths for source in sources]).encode()).hexdigest()
        return build(sources, *arguments, **keywords)

    def written(path: Path, chunks: Any, *, digests: Any = None) -> None:
        kept = folder / files[0] / path.name
        if kept.exists():
            _copy_whole(kept, path)
        else:
            write(path, chunks, digests=digests)
            _copy_whole(path, kept)

    TokenCache.build, cache_files.write = staticmethod(built), written  # type: ignore[method-assign, assignment]


def _copy_whole(source: Path, target: Path) -> None:
    """Unless `target` appears meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copied.") as folder:
        shutil.copytree(source, Path(folder) / "copy")
        with contextlib.suppress(OSError):
            (Path(folder) / "copy").rename(target)


def _world(
    source: tuple[str, str], world_size: int, timeout_s: float, arguments: dict[str, Any], cuda: bool
) -> tuple[str, list[Any]]:
    port = free_port_block()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        places = [place(rank, world_size, port, cuda=cuda) for rank in range(world_size)]
        pids = [_fork(source, one, Path(folder), arguments) for one in places]
        _wait(pids, timeout_s)
        failed, results = "", []
        for rank in range(world_size):
            file = Path(folder) / f"{rank}.pickle"
            kind, value = pickle.loads(file.read_bytes()) if file.exists() else ("error", "killed: hung or crashed")
            if kind == "error":
                failed += f"rank {rank} of {world_size}: {value}\n"
            results.append(value)
        return failed, results


def _fork(source: tuple[str, str], environment: dict[str, str], folder: Path, arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status, rank = 0, environment["RANK"]
    try:
        os.environ.update(environment)
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
