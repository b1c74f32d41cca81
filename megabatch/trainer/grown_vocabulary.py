"""Weights whose vocabulary is smaller than the model's: the rows of new tokens are the mean of those that there are.

As in transformers' `resize_token_embeddings`, but without the noise that it adds there (1e-9 of the rows' covariance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megabatch.converters.mapping import Mapped
from megabatch.converters.safetensors_io import HfFolder
from megabatch.trainer.weights import TORCH_DTYPES

_BLOCK_ROWS = 4096
"""Rows that are read at a time for the mean."""


class GrownVocabulary:
    """A `Source` over a folder in which each tensor of the vocabulary has so many rows."""

    def __init__(self, folder: HfFolder, table: Sequence[Mapped], *, rows: int) -> None:
        self._folder = folder
        self.table = [_grown(mapped, rows) for mapped in table]
        """The table of the grown tensors."""
        self._names = {piece.hf for mapped in table if mapped.split == "vocab" for piece in mapped.pieces}

    def itemsize(self, name: str) -> int:
        return self._folder.itemsize(name)

    def read_into(
        self,
        name: str,
        into: memoryview,
        *,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        index: int | None = None,
    ) -> None:
        if name not in self._names:
            self._folder.read_into(name, into, rows=rows, cols=cols, index=index)
            return
        assert rows is not None and cols is None, "tensors of the vocabulary are split by rows"
        start, stop = rows
        width = into.nbytes // (stop - start)
        there = min(stop, self._folder.tensors[name].shape[0])
        if start < there:
            self._folder.read_into(name, into[: (there - start) * width], rows=(start, there))
        new = stop - max(start, there)
        if new > 0:
            into[into.nbytes - new * width :] = self.mean(name) * new

    def mean(self, name: str) -> bytes:
        """The mean row of a tensor in its own dtype: summed row by row in fp64, so it is the same on every rank."""
        info = self._folder.tensors[name]
        count, width = info.shape
        dtype = TORCH_DTYPES[info.dtype]
        total: np.ndarray = np.zeros(width)
        for start in range(0, count, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, count)
            block = bytearray((stop - start) * width * dtype.itemsize)
            self._folder.read_into(name, memoryview(block), rows=(start, stop))
            lying = torch.frombuffer(block, dtype=dtype).view(-1, width).double()
            total += np.add.reduce(lying.numpy(), axis=0)
        row = torch.from_numpy(total / count).to(dtype)
        return row.view(torch.uint8).numpy().tobytes()


def _grown(mapped: Mapped, rows: int) -> Mapped:
    if mapped.split != "vocab":
        return mapped
    [[piece]] = mapped.sections
    return replace(mapped, shape=(rows, *mapped.shape[1:]), sections=((replace(piece, rows=(0, rows)),),))
