"""Has megatron-core write its checkpoints in this process, as it does from 0.19 on.

0.16 starts two processes for every save, and a manager process by spawn, which take seconds.
"""

from __future__ import annotations

import queue
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies


class _InProcessWriter(filesystem_async.FileSystemWriterAsync):
    def get_save_function_and_args(self) -> Any:
        function, preload, arguments = super().get_save_function_and_args()
        if function is None:
            return function, preload, arguments
        transforms = [self.transforms] if hasattr(self, "transforms") else []
        return partial(_write_buckets, transforms), preload, arguments


def _write_buckets(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    written: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        outcome: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, outcome, pending, True)
        _, value = outcome.get()
        if isinstance(value, Exception):
            results.put(value)
            return
        written[i] = value
    results.put(written)


def use_in_process_writer() -> None:
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda mp_mode="spawn": queue.Queue())
    if hasattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        torch_strategies.FileSystemWriterAsync = _InProcessWriter
