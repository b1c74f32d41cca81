"""Executes a plan: workers put tensors in their place, and a tensor is journalled when its bytes are on disk."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megabatch.converters.engine.journal import Journal
from megabatch.converters.engine.plan import Plan, TargetFile, Tensor
from megabatch.converters.engine.sources import Sources, allow_files
from megabatch.converters.engine.windows import Windows
from megabatch.errors import ConversionError

SYNC_BYTES = 64 << 20
"""Most work that a killed rank repeats, besides the tensors in progress."""
_LARGE = 64 << 20

Progress = Callable[[int], None]
"""Called with the bytes of each tensor that is written."""


def share(plan: Plan, *, rank: int, world: int) -> list[int]:
    """Numbers of the tensors that one rank writes: neighbours, so that its reads and writes stay close together."""
    total = sum(tensor.data_bytes for tensor in plan.tensors) or 1
    mine, position = [], 0
    for number, tensor in enumerate(plan.tensors):
        middle = position + tensor.data_bytes / 2
        if min(world - 1, int(middle * world / total)) == rank:
            mine.append(number)
        position += tensor.data_bytes
    return mine


class Targets:
    """The files that a plan writes, each created at full size with the bytes around its tensors."""

    def __init__(self, folder: Path, files: Sequence[TargetFile]) -> None:
        self._folder = folder
        self._names = [file.name for file in files]
        self._open: list[int] = []
        for file in files:
            self._open.append(self._create(file))

    def _create(self, file: TargetFile) -> int:
        path = self._folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0o666 lets the umask decide, as for any file that a user makes
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(made).st_size != file.size:
            os.ftruncate(made, file.size)
        pwrite(made, memoryview(file.head), 0)
        pwrite(made, memoryview(file.tail), file.size - len(file.tail))
        return made

    def write(self, number: int, data: memoryview, offset: int) -> None:
        pwrite(self._open[number], data, offset)

    def sync(self, numbers: set[int]) -> None:
        for number in numbers:
            os.fdatasync(self._open[number])

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())


def pwrite(file: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def execute(
    plan: Plan, numbers: Sequence[int], folder: Path, journal: Journal, *, workers: int, progress: Progress
) -> None:
    """Writes these tensors below `folder` and journals them.

    Raises: ConversionError naming the file that failed; tensors journalled until then stay done.
    """
    allow_files(len(plan.sources) + len(plan.files))
    targets = Targets(folder, plan.files)
    with Sources(plan.sources) as sources:
        try:
            targets.sync(set(range(len(plan.files))))
            _Run(plan, numbers, targets, sources, journal, progress).finish(max(1, min(workers, len(numbers))))
        except OSError as error:
            raise unwritable(folder, plan, error) from error
        finally:
            targets.close()


def unwritable(folder: Path, plan: Plan, error: OSError) -> ConversionError:
    """The one message for a write that failed."""
    text = "disk full" if error.errno == errno.ENOSPC else f"cannot be written: {error.strerror}"
    return ConversionError(f"{error.filename or folder}: {text}; {plan.bytes_needed} bytes are needed in all")


class _Run:
    """The workers of one rank, and the thread that syncs and journals behind them."""

    def __init__(
        self,
        plan: Plan,
        numbers: Sequence[int],
        targets: Targets,
        sources: Sources,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._plan, self._targets, self._sources = plan, targets, sources
        self._journal, self._progress = journal, progress
        # large ones first, so that no single worker is still busy with one at the end
        large = [number for number in numbers if plan.tensors[number].data_bytes > _LARGE]
        large.sort(key=lambda number: -plan.tensors[number].data_bytes)
        known = set(large)
        self._waiting = deque([*large, *(number for number in numbers if number not in known)])
        self._written: list[int] = []
        self._unsynced = 0
        self._changed = threading.Condition()
        self._over = False

    def finish(self, workers: int) -> None:
        with ThreadPoolExecutor(workers + 1) as pool:
            syncer = pool.submit(self._sync)
            running = [pool.submit(self._work) for _ in range(workers)]
            try:
                for worker in running:
                    worker.result()
            except BaseException:
                self._waiting.clear()
                raise
            finally:
                with self._changed:
                    self._over = True
                    self._changed.notify()
            syncer.result()

    def _work(self) -> None:
        windows = Windows(self._sources)
        while True:
            try:
                number = self._waiting.popleft()
            except IndexError:
                return
            tensor = self._plan.tensors[number]
            try:
                _write(tensor, windows, self._targets)
            except BaseException:
                self._waiting.clear()
                raise
            self._progress(tensor.data_bytes)
            with self._changed:
                self._written.append(number)
                self._unsynced += tensor.data_bytes
                if self._unsynced >= SYNC_BYTES:
                    self._changed.notify()

    def _sync(self) -> None:
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._unsynced >= SYNC_BYTES)
                over, written = self._over, self._written
                self._written, self._unsynced = [], 0
            self._targets.sync({self._plan.tensors[number].file for number in written})
            self._journal.add(written)


def _write(tensor: Tensor, windows: Windows, targets: Targets) -> None:
    """The data, and around it what depends on its checksum."""
    crc, at = 0, tensor.data_offset
    for block in windows.of(tensor):
        if tensor.frame is not None:
            crc = zlib.crc32(block, crc)
        targets.write(tensor.file, block, at)
        at += block.nbytes
    if tensor.frame is not None:
        targets.write(tensor.file, memoryview(tensor.frame.prefix(crc)), tensor.offset)
        targets.write(tensor.file, memoryview(tensor.frame.suffix(crc)), at)
