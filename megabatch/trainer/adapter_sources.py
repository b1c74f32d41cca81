"""Where an adapter's numbers come from before training: new ones, or a folder of PEFT's or megatron-core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megabatch.converters.adapters.adapter import Whole
from megabatch.converters.adapters.fit import Fitting
from megabatch.converters.adapters.targets import Target
from megabatch.converters.engine.gather import matrix_bytes
from megabatch.converters.engine.plan import Matrix
from megabatch.converters.engine.sources import Sources
from megabatch.trainer.made_tensors import MadeTensors
from megabatch.trainer.weights import TORCH_DTYPES

Start = Literal["kaiming", "gaussian"]


class FreshAdapters(MadeTensors):
    """Initial values as in PEFT: A uniform within 1 / sqrt(columns) (`kaiming`) or normal with standard deviation
    1 / rank (`gaussian`), B zero; for an embedding, A zero and B normal."""

    def __init__(self, targets: Sequence[Target], *, seed: int, start: Start) -> None:
        super().__init__({n: dims for target in targets for n, dims in target.peft_shapes().items()}, seed=seed)
        self._start = start
        self._target_of = {name: target for target in targets for name in target.peft_shapes()}

    def made(self, name: str) -> Tensor:
        target, shape = self._target_of[name], self.shapes[name]
        if name.endswith("lora_embedding_A" if target.is_embedding else "lora_B.weight"):
            return torch.zeros(shape)
        tensor, generator = torch.empty(shape), self.generator(name)
        if target.is_embedding:
            return tensor.normal_(generator=generator)
        if self._start == "gaussian":
            return tensor.normal_(0.0, 1 / target.rank, generator=generator)
        bound = shape[1] ** -0.5
        return tensor.uniform_(-bound, bound, generator=generator)


class ReadAdapter(MadeTensors):
    """An adapter's matrices by their names in PEFT's folder, and the tensors that were trained in full."""

    def __init__(self, fitting: Fitting) -> None:
        self._sources = Sources(fitting.adapter.sources)
        self._found: dict[str, Matrix | Whole] = {**fitting.matrices, **fitting.adapter.whole}
        shapes = {name: found.shape for name, found in self._found.items()}
        super().__init__(shapes, seed=0)

    def made(self, name: str) -> Tensor:
        found = self._found[name]
        matrix = found if isinstance(found, Matrix) else _as_matrix(found)
        lying = torch.frombuffer(matrix_bytes(self._sources, matrix), dtype=TORCH_DTYPES[matrix.dtype])
        tensor = lying.view(matrix.rows, matrix.columns).float()
        if matrix.pick is not None:
            tensor = tensor[:, slice(*matrix.pick)]
        tensor = tensor.t() if matrix.transposed else tensor
        return tensor.reshape(self.shapes[name])


def _as_matrix(whole: Whole) -> Matrix:
    rows = whole.strips[-1].row + whole.strips[-1].rows
    return Matrix(rows, torch.Size(whole.shape).numel() // rows, whole.dtype, whole.strips)
