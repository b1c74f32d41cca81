"""Writing torch_dist files: every rank its own, synced by it, with digests taken while they are written.

The format is torch's and megatron-core's; the writer is ours. megatron-core's writer starts processes on every rank,
even for a synchronous save, and behaves differently in 0.16 and 0.19. `write_items` touches no process group, so it
can run in the background on `copied` items. The ranks agree before it (`plan`) and after it (`write_metadata`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from xxhash import xxh3_64

from megabatch.saved.manifest import WHOLE, File, Range

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"

Item = tuple[MetadataIndex, io.BytesIO | torch.Tensor]
"""Where a part of the state belongs, and its bytes or tensor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes; on the main rank also the metadata of the whole checkpoint."""

    items: SavePlan
    planner: Any
    common: Mapping[str, Any]
    metadata: Metadata | None


@dataclass(frozen=True, slots=True)
class Written:
    """What this rank wrote."""

    results: list[WriteResult]
    files: dict[str, File]


def plan(state: dict[str, Any], *, content: Mapping[str, Any]) -> Plan:
    """Plans which rank writes which part of a state made of megatron-core's sharded tensors; collective.

    Args: content: the layout of the state, for megatron-core's readers.
    """
    sharded, common = save_preprocess({**state, "content_metadata": dict(content)}, True)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    is_main = dist.get_rank() == 0
    planner.set_up_planner(mcore_to_pyt_state_dict(flat, False), is_coordinator=is_main)
    mine = planner.create_local_plan()
    everyone: list[Any] | None = [None] * dist.get_world_size() if is_main else None
    dist.gather_object(mine, everyone, dst=0)
    metadata = planner.create_global_plan(everyone)[1] if everyone is not None else None
    return Plan(planner.finish_plan(planner.create_decentralized_global_plan(mine)), planner, common, metadata)


def items(planned: Plan) -> Iterator[Item]:
    """What this rank writes, with current values; tensors may be the live ones."""
    for item in sorted(planned.items.items, key=lambda item: item.type != WriteItemType.BYTE_IO):
        yield item.index, planned.planner.resolve_data(item)


def copied(found: Iterable[Item]) -> list[Item]:
    """Copies of the items in host memory, which training does not change."""
    copies = [(index, data if isinstance(data, io.BytesIO) else _copy(data)) for index, data in found]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies


def write_items(found: Iterable[Item], directory: Path, *, rank: int) -> Written:
    """Writes and syncs this rank's `.distcp`; writes nothing if this rank has no items.

    Raises: OSError, RuntimeError.
    """
    first = list(islice(found := iter(found), 1))
    if not first:
        return Written([], {})
    name = f"__{rank}_0.distcp"
    results, ranges = [], []
    # torch's own checksum inside each archive takes longer than ours, and torch never reads it
    with _without_archive_checksums(), digesting(directory / name) as file:
        for index, data in chain(first, found):
            start = file.begin()
            if isinstance(data, io.BytesIO):
                file.write(data.getbuffer())
            else:
                torch.save(_alone(data), file)
            part = file.end(index.fqn, start)
            ranges.append(part)
            results.append(WriteResult(index, part.size, _StorageInfo(name, part.offset, part.size)))
    return Written(results, {name: File(file.size, tuple(ranges))})


def write_metadata(planned: Plan, directory: Path, results: list[list[WriteResult]]) -> dict[str, File]:
    """On the main rank: writes the files that describe the whole checkpoint. Raises: OSError, RuntimeError."""
    assert planned.metadata is not None
    planned.metadata.storage_data = {one.index: one.storage_data for part in results for one in part}
    planned.metadata.storage_meta = StorageMeta()
    files = {}
    with digesting(directory / METADATA) as file:
        pickle.dump(planned.metadata, file)
    files[METADATA] = file.whole()
    with digesting(directory / COMMON) as file:
        torch.save(dict(planned.common), file)
    files[COMMON] = file.whole()
    with digesting(directory / CONFIG) as file:
        file.write(json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode())
    files[CONFIG] = file.whole()
    return files


class DigestingFile:
    """A file written sequentially, with a digest of each part."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = xxh3_64()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def begin(self) -> int:
        """Starts a part and returns its offset."""
        self._digest = xxh3_64()
        return self.size

    def end(self, name: str, start: int) -> Range:
        return Range(name, start, self.size - start, self._digest.hexdigest())

    def whole(self) -> File:
        """The manifest's entry for a file written as one part."""
        return File(self.size, (self.end(WHOLE, 0),))


@contextmanager
def digesting(path: Path) -> Iterator[DigestingFile]:
    """A new file, synced when the block ends."""
    with open(path, "wb") as file:
        yield DigestingFile(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _without_archive_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _copy(data: torch.Tensor) -> torch.Tensor:
    if not data.is_cuda:
        return data.detach().clone()
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)  # torch reuses pinned memory for the next copy
    return host.copy_(data.detach(), non_blocking=True)


def _alone(data: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory with a storage of its own, because torch.save writes whole storages."""
    tensor = data.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
