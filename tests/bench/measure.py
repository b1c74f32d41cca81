"""Figures and how they are taken: time of commands, peak memory of a block, the plain cost of reading and writing."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from megabatch.slurm.ports import free_port_block

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
TOY = os.environ.get("BENCH_TOY") == "1"
"""Whether benchmarks only show that they run: small models, one repetition, figures that mean nothing."""

T = TypeVar("T")


def sized(full: T, toy: T) -> T:
    """What a benchmark takes, and what it takes where it only shows that it runs."""
    return toy if TOY else full


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    """`s`, `ms`, `MiB`, or `x` for a ratio."""
    target: float | None = None
    """What it should be at most; None where nothing was promised."""
    note: str = ""
    """What the number is made of."""

    @property
    def missed(self) -> bool:
        return self.target is not None and self.value > self.target


@dataclass(frozen=True, slots=True)
class Cost:
    """One run of a command."""

    wall_s: float
    cpu_s: float
    """User and system time of the process and the children that it waited for."""


def environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread for each process, as the launcher sets it, and compiled code kept."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def command_cost(command: Sequence[str], *, cwd: Path = ROOT) -> Cost:
    """Raises: CalledProcessError with the command's output when it fails."""
    with subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        started = time.perf_counter()
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), stderr=said)
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def alternated(commands: Sequence[Sequence[str]], *, times: int, cwd: Path = ROOT) -> list[list[Cost]]:
    """Costs of each command, run in turn after one unmeasured round that warms the file cache."""
    warm_up = sized(1, 0)
    rounds = [[command_cost(command, cwd=cwd) for command in commands] for _ in range(times + warm_up)][warm_up:]
    return [list(costs) for costs in zip(*rounds, strict=True)]


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Peak:
    """How far resident memory rose above its start within a `peak_memory` block."""

    mib = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Mapped file pages count too; memory that an earlier block left to this process's threads does not, so that of
    several blocks the largest peak is the true one. Linux only: the high-water mark is set back through /proc."""
    peak = Peak()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds would hide what the block takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_kib("VmRSS")
    yield peak
    peak.mib = max(0, status_kib("VmHWM") - before) / 1024


def status_kib(name: str) -> int:
    """A line of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def write_plain(path: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes from memory: what `dd` would take."""
    block = memoryview(os.urandom(MIB) * 16)

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            left = size
            while left:
                left -= file.write(block[: min(left, len(block))])
            os.fsync(file.fileno())

    taken = seconds(write)
    path.unlink()
    return taken


def read_plain(path: Path) -> float:
    """Seconds to read every file below `path` from the file cache into memory of its own."""
    return seconds(lambda: [file.read_bytes() for file in files_below(path)])


def copy_plain(source: Path, target: Path) -> float:
    """Seconds to read `source` and write it to `target`, synced; both are files, the target is removed again."""

    def copy() -> None:
        with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
            while block := read.read(16 * MIB):
                write.write(block)
            os.fsync(write.fileno())

    taken = seconds(copy)
    target.unlink()
    return taken


def files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def bytes_below(path: Path) -> int:
    return sum(p.stat().st_size for p in files_below(path))


def in_trainer_processes(script: str, folder: Path, *, world_size: int = 1, words: Sequence[str] = ()) -> list[Figure]:
    """Figures of a script beside this one that needs torch; each process is a rank, the first one answers.

    Args: words: the script's arguments behind FOLDER and ANSWER."""
    answer = folder / "figures.json"
    words = [str(Path(__file__).with_name(script)), str(folder), str(answer), *words]
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port_block())}
    ranks = [
        start_trainer(words, environment(**place, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(world_size)
    ]
    for rank in ranks:
        if status := rank.wait():
            raise subprocess.CalledProcessError(status, words)
    return [Figure(**values) for values in json.loads(answer.read_text(encoding="utf-8"))]


def start_trainer(
    words: Sequence[str], place: Mapping[str, str], *, output: int | None = None, errors: int | None = None
) -> Trainer:
    """Starts Python with these words in a process that imports torch and megatron-core, which at toy size are imported
    once for all. Args: place: its environment; output, errors: file descriptors, None for ours."""
    if not TOY:
        command = [sys.executable, "-W", "ignore", *words]
        return subprocess.Popen(command, cwd=ROOT, env=dict(place), stdout=output, stderr=errors)
    return Forked(words, place, output, errors)


class Trainer(Protocol):
    """What `subprocess.Popen` and `Forked` have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Forked:
    """A child of this process, which has imported already what its words would."""

    def __init__(self, words: Sequence[str], place: Mapping[str, str], output: int | None, errors: int | None) -> None:
        _import_trainer()
        sys.stdout.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for given, own in ((output, 1), (errors, 2)):
                if given is not None:
                    os.dup2(given, own)
            self._become(list(words), place)

    def _become(self, words: list[str], place: Mapping[str, str]) -> None:
        status = 1
        try:
            os.chdir(ROOT)
            os.environ.clear()
            os.environ.update(place)
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as e:
            status = int(e.code or 0) if isinstance(e.code, int | None) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@functools.cache
def _import_trainer() -> None:
    os.environ.update(environment())
    warnings.simplefilter("ignore")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    importlib.import_module("megabatch.trainer.loop")


def answer(figures: Sequence[Figure], path: str) -> None:
    """The other end of `in_trainer_processes`."""
    Path(path).write_text(json.dumps([asdict(figure) for figure in figures]), encoding="utf-8")
