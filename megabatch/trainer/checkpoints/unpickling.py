"""Reading checkpoints as data: a pickle in them may name what a checkpoint is made of, and nothing else.

torch and megatron-core unpickle `.metadata`, and every object that is not a tensor, without restrictions: anyone who
can write to a checkpoint's folder could run code on the ranks that read it next. Groups often share folders, so
checking who may write there would not be enough.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem

from megabatch.errors import CheckpointError

_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = {
    f"{_CHECKPOINT}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
}
"""The names that a `.metadata` may contain, besides torch's dtypes."""

_NUMPY: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.random.RandomState]
"""The types in the state of numpy's generator."""


@contextlib.contextmanager
def as_data() -> Iterator[None]:
    """Inside this context, a checkpoint's pickle that names anything else raises before any of it is called."""
    unpickling, forced = filesystem.pickle, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    filesystem.pickle = SimpleNamespace(load=_load, dump=pickle.dump)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.load reads it on every call and overrides its caller
    try:
        with torch.serialization.safe_globals([*_NUMPY, _reconstruct()]):
            yield
    finally:
        filesystem.pickle = unpickling
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise CheckpointError(f".metadata names {module}.{name}, which no checkpoint consists of: it is not loaded")


def _load(file: IO[bytes]) -> Any:
    return _Unpickler(file).load()


def read_metadata(data: bytes) -> Any:
    """The `Metadata` in a `.metadata`. Raises: CheckpointError when it names anything else."""
    return _load(io.BytesIO(data))


def _reconstruct() -> Any:
    """numpy's function for unpickling arrays; its module was renamed in numpy 2."""
    reduced: Any = np.empty(0).__reduce__()
    return reduced[0]
