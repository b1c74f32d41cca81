"""Errors of LoRA on Transformer Engine's layers against fp64, as JSON: {layer: {what: relative L2 error}}.

python adapter_errors.py RUN_DIR      (a run with adapters in bf16; the layers are those of its first layer)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rank_server import place
from torch import Tensor

from megabatch.config.run import RunConfig
from megabatch.slurm.ports import free_port_block
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.loop import open_loop
from megabatch.trainer.model.lora import grouped
from megabatch.trainer.model.lora.grouped import Grouped
from megabatch.trainer.model.lora.layers import adapted_layers
from megabatch.trainer.model.naming import unwrap, weight_names
from megabatch.trainer.signals import StopSignal

ROWS = 48


def errors(run: RunConfig) -> dict[str, dict[str, float]]:
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        chunk = unwrap(loop.engine.model.chunks[0])
        adapted = set(adapted_layers([chunk]))
        found: dict[str, dict[str, float]] = {}
        for name, layer in chunk.named_modules():
            if layer in adapted and ".layers.0." in name and type(layer).__name__.startswith("AdaptedTE"):
                found[name] = _of(layer)
                if isinstance(layer.lora.current, Grouped):
                    plain, grouped._grouped_mm = grouped._grouped_mm, None
                    found[f"{name}, one by one"] = _of(layer)
                    grouped._grouped_mm = plain
    return found


def _of(layer: Any) -> dict[str, float]:
    """Output and gradients of a layer with random matrices, so large that the adapter's term is half of the output."""
    generator = torch.Generator("cuda").manual_seed(1)
    adapters = [*layer.lora.current] if isinstance(layer.lora.current, Grouped) else [layer.lora.current]
    matrices = [getattr(adapter, side) for adapter in adapters for side in ("A", "B")]
    with torch.no_grad():
        for matrix in (*matrices, *(getattr(layer, name) for name in weight_names(layer))):
            matrix.copy_(torch.randn(matrix.shape, generator=generator, device="cuda") / matrix.shape[1] ** 0.5)
        if (norm := getattr(layer, "layer_norm_weight", None)) is not None:
            norm.copy_(1 + torch.randn(norm.shape, generator=generator, device="cuda") / 4)
    rows = _rows(len(adapters))
    width = getattr(layer, weight_names(layer)[0]).shape[1]
    x = torch.randn(sum(rows), width, generator=generator, device="cuda").bfloat16().requires_grad_()
    out = layer(x, rows)[0] if len(adapters) > 1 else layer(x[:, None])[0][:, 0]
    weights = torch.randn(out.shape, generator=generator, device="cuda")
    grads = torch.autograd.grad((out * weights).sum(), [x, *matrices])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *matrices)]
    reference = _exact(layer, adapters, rows, *exact)
    truths = torch.autograd.grad((reference * weights).sum(), exact)
    without = _exact(layer, adapters, rows, exact[0], *(torch.zeros_like(one) for one in exact[1:]))
    return {
        "output": _relative(out, reference),
        "input's gradient": _relative(grads[0], truths[0]),
        "A and B": max(_relative(grad, truth) for grad, truth in zip(grads[1:], truths[1:], strict=True)),
        "without adapter": _relative(without, reference),
    }


def _rows(count: int) -> list[int]:
    """How many rows each expert has; one has none."""
    return [ROWS] if count == 1 else [0, 7, *[1] * (count - 3), ROWS - 7 - (count - 3)]


def _exact(layer: Any, adapters: Sequence[Any], rows: list[int], x: Tensor, *matrices: Tensor) -> Tensor:
    """x W^T + scale * (x A^T) B^T of each expert's rows in fp64, written out; a layer with a norm reads norm(x)."""
    norm = getattr(layer, "layer_norm_weight", None)
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + layer.eps).rsqrt() * norm.double()
    parts = []
    for i, (adapter, part) in enumerate(zip(adapters, x.split(rows), strict=True)):
        A, B = matrices[2 * i], _wide(adapter, matrices[2 * i + 1])
        weight = getattr(layer, weight_names(layer)[i]).double()
        parts.append(part @ weight.t() + adapter.scale * (part @ A.t()) @ B.t())
    return torch.cat(parts)


def _wide(adapter: Any, B: Tensor) -> Tensor:
    """B with zeros where a row's part and a column's differ; a layer of several parts has an A for each."""
    belongs = adapter._buffers.get("_belongs")
    return B if belongs is None else (B[:, None, :] * belongs.double()[:, :, None]).flatten(1)


def _relative(found: Tensor, truth: Tensor) -> float:
    return (
        float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)) if truth.norm() else float(found.norm())
    )


if __name__ == "__main__":
    os.environ.update(place(0, 1, free_port_block(), cuda=True))
    print(json.dumps(errors(RunConfig.load(Path(sys.argv[1]) / "run.json"))))
