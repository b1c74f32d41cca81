"""Weights that are computed and not read from a folder: a new model's, and adapters before training."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.family import Family
from megabatch.converters.safetensors_io import Writer
from megabatch.plan.shape import ModelShape
from megabatch.trainer.weights import SAFETENSORS_DTYPES, bytes_of


class MadeTensors:
    """A `Source` of fp32 tensors. Draws each as a whole, on the CPU, from a seed and its name, before a rank takes its
    part, so it is the same in every layout."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int) -> None:
        self.shapes, self.seed = shapes, seed
        self.dtypes = dict.fromkeys(shapes, "F32")
        self._last: tuple[str, Tensor] | None = None

    def made(self, name: str) -> Tensor:
        """The whole tensor."""
        raise NotImplementedError

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed << 32 | zlib.crc32(name.encode()))

    def itemsize(self, name: str) -> int:
        return 4

    def read_into(
        self,
        name: str,
        into: memoryview,
        *,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        index: int | None = None,
    ) -> None:
        tensor = self._tensor(name)
        if index is not None:
            tensor = tensor[index]
        if rows is not None:
            tensor = tensor[slice(*rows)]
        if cols is not None:
            tensor = tensor[:, slice(*cols)]
        into[:] = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def save(self, file: Path, *, dtype: torch.dtype) -> None:
        """Writes all of them as safetensors. Raises: ConversionError if the file cannot be written."""
        kind = SAFETENSORS_DTYPES[dtype]
        with Writer(file, {name: TensorInfo(kind, shape) for name, shape in self.shapes.items()}) as writer:
            for name in self.shapes:
                writer.write(name, bytes_of(self._tensor(name).to(dtype)))

    def _tensor(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self.made(name)
        return self._last[1]


class RandomWeights(MadeTensors):
    """A new model: matrices are normal with standard deviation `std`, norms are ones, biases zeros."""

    def __init__(self, family: Family, shape: ModelShape, *, seed: int, std: float = 0.02) -> None:
        super().__init__(family.hf_tensors(shape), seed=seed)
        self.std = std

    def made(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.empty(shape).normal_(0.0, self.std, generator=self.generator(name))
