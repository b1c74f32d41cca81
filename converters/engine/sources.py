"""The files that a plan reads, opened once and shared by all threads."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Sequence
from types import TracebackType

from megabatch.converters.engine.plan import SourceFile
from megabatch.converters.regular_files import open_regular
from megabatch.errors import ConversionError


def allow_files(count: int) -> None:
    """Lets this process have so many files open, where its limit may be raised: checkpoints have a file for each rank
    that saved them, and often 1024 is the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))


class Sources:
    """Positioned reads by file number. Raises: ConversionError naming file and byte."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        allow_files(len(files))
        self._files = files
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def read_into(self, number: int, into: memoryview, offset: int) -> None:
        """Fills `into` from one file."""
        file = self._descriptor(number)
        try:
            while into.nbytes:
                count = os.preadv(file, [into], offset)
                if count == 0:
                    raise ConversionError(
                        f"{self._files[number].path}: truncated while it was being read, at byte {offset}"
                    )
                into, offset = into[count:], offset + count
        except OSError as error:
            path = self._files[number].path
            raise ConversionError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error

    def _descriptor(self, number: int) -> int:
        with self._lock:
            if number not in self._open:
                self._open[number] = open_regular(self._files[number].path)
            return self._open[number]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
