"""Weights to a real vLLM server against a plain gloo broadcast of the same bytes between two processes.

By wall-clock time, because most of the work is another process's: in turns, so that other load meets both. The
server's time includes vLLM's reload of every layer.
Run by `run.py`: python tests/bench/server_sync.py FOLDER ANSWER
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from made_runs import SMALL, WEIGHTY, recipe, write_run
from measure import MIB, Figure, answer, median, sized

from megabatch.data.tokens.tokenizer import train_bpe
from megabatch.errors import RolloutError
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.command import server_command, server_environment
from megabatch.rollout.vllm.engine_options import EngineOptions, installed
from megabatch.rollout.vllm.group import meet, open_store
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block
from megabatch.trainer import assemble
from megabatch.trainer.model_source import model_source
from megabatch.trainer.sync.exchange import shared_buckets

ROUNDS = sized(7, 1)
CPU = torch.device("cpu")
_PEER = """
import sys, torch
from megabatch.rollout.vllm.group import join
group = join("127.0.0.1", int(sys.argv[1]), rank=1, size=2, device=torch.device("cpu"), timeout_s=3600)
into = torch.empty(int(sys.argv[2]), dtype=torch.uint8)
while True:
    group.broadcast(into)
"""


def main(folder: Path) -> list[Figure]:
    run = write_run(recipe(folder, sized(WEIGHTY, SMALL)), folder / "run")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        table = source.family.tensors(engine.model.shape, experts="per_expert")
        size = sum(parameter.nbytes for chunk in engine.model.chunks for parameter in chunk.parameters())
        with served(source.config_folder) as server, broadcasting(size) as broadcast:

            def send() -> None:
                server.begin_update(1)
                for bucket in shared_buckets(engine.model, table, ranks, receivers="main"):
                    server.put(bucket)
                server.end_update()

            pairs = [(timed(send), timed(broadcast)) for _ in range(ROUNDS + 1)][1:]
    ours, plain = (median([pair[side] for pair in pairs]) for side in (0, 1))
    ratio = median([mine / theirs for mine, theirs in pairs])
    note = f"{size / MIB:.0f} MiB; {ours * 1e3:.0f} ms and {plain * 1e3:.0f} ms, median of {len(pairs)} pairs"
    return [Figure(name="weights to a server / broadcast", value=ratio, unit="x", target=1.5, note=note)]


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextmanager
def served(config_folder: Path) -> Iterator[Server]:
    """With random weights of its own."""
    train_bpe(["a small text"], vocab_size=300, out_dir=config_folder)
    options = EngineOptions(
        model=str(config_folder), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
        more={"load_format": "dummy", "kv_cache_memory_bytes": 16 * MIB, "distributed_executor_backend": "uni"},
    )  # fmt: skip
    port = free_port_block()
    words = server_command(options, host="127.0.0.1", port=port, on_cpus=True)
    log = open(config_folder / "server.log", "wb")  # noqa: SIM115 - the server's, as long as it lives
    environment = {**server_environment(os.environ, dtype=options.dtype, on_cpus=True), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [vllm_python(), *words[1:]], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    server = Server(Client(f"http://127.0.0.1:{port}", timeout_s=600), owner="bench", device=CPU, timeout_s=600)
    try:
        server.wait()
        yield server
    except RolloutError as e:
        raise SystemExit(f"{e}; {(config_folder / 'server.log').read_text()[-2000:]}") from e
    finally:
        server.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def vllm_python() -> str:
    """Of the environment that `make vllm` makes."""
    if installed() is not None:
        return sys.executable
    beside = Path(sys.prefix, "vllm", "bin", "python")
    if not beside.exists():
        raise SystemExit("needs vLLM for CPUs: make vllm")
    return str(beside)


@contextmanager
def broadcasting(size: int) -> Iterator[Callable[[], None]]:
    """A broadcast of so many bytes to another process, in one call."""
    store = open_store(timeout_s=600)
    peer = subprocess.Popen([sys.executable, "-c", _PEER, str(store.port), str(size)])
    group = meet(store, size=2, device=CPU, timeout_s=600, failed=lambda: None)
    data = torch.ones(size, dtype=torch.uint8)

    def broadcast() -> None:
        group.broadcast(data)

    try:
        yield broadcast
    finally:
        peer.kill()
        peer.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(exist_ok=True)
    answer(main(Path(sys.argv[1])), sys.argv[2])
