"""Muon: descends along the orthogonalized mean of gradients, matrix by matrix.

The mean m = momentum * m + (1 - momentum) * g, with Nesterov momentum * m + (1 - momentum) * g of the new m, is
brought near the closest matrix with orthogonal rows or columns by steps X <- aX + (bA + cA^2)X, A = X X^T
(Newton-Schulz; K. Jordan, kellerjordan.github.io/posts/muon), multiplied with a scale that depends on the shape, and
subtracted `lr` times. Weight decay is decoupled (arXiv:2502.16982, eq. 3). The formulas are those of megatron-core's
`TensorParallelMuon` (0.16.1), which needs a release of emerging_optimizers that is on no package index.

M, N: rows and columns of a matrix or of this rank's part of it. K: the smaller of a whole matrix's two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice, repeat
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = "momentum_buffer"
"""The state of a matrix."""

_Step = tuple[float, float, float]
_COEFFICIENTS: Mapping[str, Sequence[_Step]] = {
    # K. Jordan, kellerjordan.github.io/posts/muon
    "simple": [(3.4445, -4.7750, 2.0315)],
    # KellerJordan/modded-nanogpt@0674386, train_gpt_medium.py
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    # arXiv:2505.16932, algorithm 1: all but the last are made safe, divided by 1.01, 1.01^3 and 1.01^5
    "polar_express": [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
}
"""(a, b, c) of each step."""
_REPEATS_LAST = ("polar_express",)
"""Sets whose last step is repeated, where there are more steps than entries; the others start over."""
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a matrix becomes the direction of its update; the parameters `muon_*` without their prefix."""

    momentum: float
    use_nesterov: bool
    scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"]
    extra_scale_factor: float
    coefficient_type: str
    num_ns_steps: int
    fp32_matmul_prec: Literal["highest", "high", "medium"]
    tp_mode: Literal["blockwise", "duplicated", "distributed"]

    def scale(self, rows: int, columns: int) -> float:
        """What an orthogonalized matrix is multiplied with."""
        shape = {
            "spectral": max(rows, columns) ** 0.5,
            "unit_rms_norm": (rows / columns) ** 0.5,
            "shape_scaling": max(1, rows / columns) ** 0.5,
        }
        return shape[self.scale_mode] * self.extra_scale_factor

    def orthogonalized(self, x_MN: Tensor, *, split: int | None = None, group: Any = None) -> Tensor:
        """Near the closest matrix to x with orthogonal rows, or columns where they are fewer.

        Args: x: fp32, the whole matrix; or the group's ranks have its parts, split along dimension `split`.
        Returns: fp32 [M, N].
        """
        turned = x_MN.shape[0] > x_MN.shape[1] if split is None else split == 0
        x = x_MN.mT if turned else x_MN  # its rows are those of A, which every rank has whole
        squares = x.square().sum()
        if split is not None:
            dist.all_reduce(squares, group=group)
        x = x / squares.sqrt().clamp_min(_SMALLEST_NORM)
        if self.fp32_matmul_prec == "medium":
            x = x.bfloat16()
        with _products(self.fp32_matmul_prec):
            for a, b, c in coefficients(self.coefficient_type, self.num_ns_steps):
                A_KK = x @ x.mT
                if split is not None:
                    A_KK = _summed(A_KK, group)
                x = torch.addmm(x, torch.addmm(A_KK, A_KK, A_KK, beta=b, alpha=c), x, beta=a)
        return (x.mT if turned else x).float()


def coefficients(name: str, steps: int) -> Iterator[_Step]:
    """(a, b, c) of each step."""
    found = _COEFFICIENTS[name]
    return islice(chain(found, repeat(found[-1])) if name in _REPEATS_LAST else cycle(found), steps)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter, or this rank's part of it, as Muon sees it."""

    split: int | None = None
    """The dimension that tensor-parallel ranks split; None where each has all of it."""
    group: Any = None
    """Those ranks."""
    parts: Sequence[Tensor] = ()
    """int64: of each matrix that the tensor fuses, its rows in the whole tensor; empty where it is one matrix."""

    @property
    def is_split(self) -> bool:
        return self.split is not None and dist.get_world_size(self.group) > 1

    def own_parts(self, rows: int) -> list[Tensor]:
        """The same rows, as far as this rank has them. Args: rows: how many it has."""
        if not self.is_split or self.split != 0:
            return list(self.parts)
        first = dist.get_rank(self.group) * rows
        return [part[(part >= first) & (part < first + rows)] - first for part in self.parts]


class Muon(torch.optim.Optimizer):
    """Muon on fp32 parameters, which may be parts of matrices; collective over the ranks that split them."""

    def __init__(self, param_groups: Iterable[dict[str, Any]], rule: Rule, matrices: Mapping[Tensor, Matrix]) -> None:
        """Args: param_groups: with `lr` and `weight_decay`; matrices: of every parameter in them."""
        super().__init__(param_groups, {})
        self.rule, self.matrices = rule, matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        momentum = self.rule.momentum
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(parameter)
                mean = state[MOMENTUM].lerp_(gradient, 1 - momentum)
                if self.rule.use_nesterov:
                    mean = gradient.lerp(mean, momentum)
                direction = self._direction(mean, self.matrices[parameter])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _direction(self, mean_MN: Tensor, matrix: Matrix) -> Tensor:
        if not matrix.is_split or self.rule.tp_mode == "blockwise":
            return _by_part(mean_MN, matrix.own_parts(len(mean_MN)), self._scaled)
        assert matrix.split is not None
        if self.rule.tp_mode == "duplicated":
            whole = _gathered(mean_MN, matrix)
            made = _by_part(whole, matrix.parts, self._scaled)
            return made.chunk(dist.get_world_size(matrix.group), matrix.split)[dist.get_rank(matrix.group)]
        return self._distributed(mean_MN, matrix)

    def _scaled(self, x_MN: Tensor, number: int) -> Tensor:
        return self.rule.orthogonalized(x_MN) * self.rule.scale(*x_MN.shape)

    def _distributed(self, mean_MN: Tensor, matrix: Matrix) -> Tensor:
        """The ranks orthogonalize a matrix together, each its own part."""
        rows, columns = mean_MN.shape
        ways = dist.get_world_size(matrix.group)
        whole = (rows * ways, columns) if matrix.split == 0 else (rows, columns * ways)
        heights = [len(part) for part in matrix.parts] or [whole[0]]

        def scaled(x: Tensor, number: int) -> Tensor:
            made = self.rule.orthogonalized(x, split=matrix.split, group=matrix.group)
            return made * self.rule.scale(heights[number], whole[1])

        return _by_part(mean_MN, matrix.own_parts(rows), scaled)


def _by_part(x_MN: Tensor, parts: Sequence[Tensor], function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A function of each part's rows and its number, or of all rows where there are no parts."""
    if not parts:
        return function(x_MN, 0)
    made = torch.empty_like(x_MN)
    for number, rows in enumerate(parts):
        at = rows.to(x_MN.device)
        made[at] = function(x_MN[at], number)
    return made


def _gathered(x_MN: Tensor, matrix: Matrix) -> Tensor:
    shards = [torch.empty_like(x_MN) for _ in range(dist.get_world_size(matrix.group))]
    dist.all_gather(shards, x_MN.contiguous(), group=matrix.group)
    return torch.cat(shards, matrix.split or 0)


def _summed(x: Tensor, group: Any) -> Tensor:
    """Over the ranks of a group, in fp32."""
    total = x.float()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Inside this context, products of fp32 matrices have this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
