"""Muon and AdamW in fp64, written from the papers and by hand: what tests compare the trainer's updates with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

JORDAN = ((3.4445, -4.7750, 2.0315),)
"""kellerjordan.github.io/posts/muon"""
QUINTIC = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
           (2.8366, -3.0525, 1.2012))  # fmt: skip
"""KellerJordan/modded-nanogpt, train_gpt_medium.py"""
POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
"""The paper's code (arXiv:2505.16932), before its safety factor."""
SAFE = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR)
SETS = {"simple": JORDAN, "quintic": QUINTIC, "polar_express": SAFE}


def orthogonalized(x: Array, kind: str = "quintic", steps: int = 5) -> Array:
    """Newton-Schulz as in the post: on the side with fewer rows, from a Frobenius norm of 1."""
    sets = SETS[kind]
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T, kind, steps).T
    x = x / max(np.sqrt((x * x).sum()), 1e-7)
    for step in range(steps):
        a, b, c = sets[step % len(sets)]
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def scale(rows: int, columns: int, mode: str) -> float:
    if mode == "spectral":  # arXiv:2502.16982, eq. 4, without its 0.2
        return float(np.sqrt(max(rows, columns)))
    return float(np.sqrt(rows / columns if mode == "unit_rms_norm" else max(1.0, rows / columns)))


@dataclass
class Muon64:
    """One matrix that Muon updates. Fields are the parameters `muon_*`."""

    momentum: float = 0.95
    nesterov: bool = False
    mode: str = "spectral"
    factor: float = 1.0
    kind: str = "quintic"
    steps: int = 5
    heads: tuple[int, int, int] | None = None
    """Of fused queries, keys and values that are orthogonalized apart: groups, query heads of a group, head size."""
    mean: Array | None = None

    def update(self, value: Array, gradient: Array, *, lr: float, decay: float) -> Array:
        self.mean = (1 - self.momentum) * gradient + (0 if self.mean is None else self.momentum * self.mean)
        mean = self.mean
        if self.nesterov:
            mean = self.momentum * mean + (1 - self.momentum) * gradient
        return value - lr * decay * value - lr * self.direction(mean)

    def direction(self, mean: Array) -> Array:
        if self.heads is None:
            made = orthogonalized(mean, self.kind, self.steps)
            return self.factor * scale(*mean.shape, self.mode) * made
        groups, queries, size = self.heads
        by_head = mean.reshape(groups, queries + 2, size, -1)
        made = np.empty_like(by_head)
        for part in (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, queries + 2)):
            chosen = by_head[:, part]
            matrix = chosen.reshape(-1, mean.shape[1])
            update = scale(*matrix.shape, self.mode) * orthogonalized(matrix, self.kind, self.steps)
            made[:, part] = self.factor * update.reshape(chosen.shape)
        return made.reshape(mean.shape)


@dataclass
class AdamW64:
    """One parameter that AdamW updates."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    done: int = 0
    moments: list[Any] = field(default_factory=lambda: [0.0, 0.0])

    def update(self, value: Array, gradient: Array, *, lr: float, decay: float) -> Array:
        self.done += 1
        hats = []
        for i, (beta, seen) in enumerate(zip(self.betas, (gradient, gradient * gradient), strict=True)):
            self.moments[i] = beta * self.moments[i] + (1 - beta) * seen
            hats.append(self.moments[i] / (1 - beta**self.done))
        return value - lr * decay * value - lr * hats[0] / (np.sqrt(hats[1]) + self.eps)
