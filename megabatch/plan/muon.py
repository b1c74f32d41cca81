"""What Muon costs where AdamW does not: its state, and the products that orthogonalize hidden matrices."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.plan import weights
from megabatch.plan.gpus import Gpu
from megabatch.plan.layer_time import MATMUL_EFFICIENCY
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk
from megabatch.plan.weights import Weight


def orthogonalizing_s(shape: ModelShape, settings: Settings, gpu: Gpu) -> float:
    """Seconds of the rank that orthogonalizes most; every data-parallel rank does the same."""
    if settings.muon is None:
        return 0.0
    flops = [0.0] * settings.layout.pp
    for chunk in settings.chunks:
        flops[chunk.pp_rank] += sum(_flops(weight, settings) for weight in _matrices(shape, settings, chunk))
    return max(flops) / (gpu.peak_tflops * 1e12 * settings.muon.peak * MATMUL_EFFICIENCY)


def _matrices(shape: ModelShape, settings: Settings, chunk: Chunk) -> Iterator[Weight]:
    """Those of a chunk that are trained."""
    kinds = weights.kinds(shape)
    for number in chunk.layers:
        for weight in weights.layer(shape, kinds[number]):
            if weight.is_hidden_matrix and f"decoder.layers.{number}.{weight.name}" not in settings.frozen:
                yield weight
    for _ in range(chunk.mtp_layers):
        yield from (weight for weight in weights.mtp_layer(shape) if weight.is_hidden_matrix)


def _flops(weight: Weight, settings: Settings) -> float:
    """Of a rank's matrices of this name: each step multiplies X X^T, its square, and their sum with X.

    Fused queries, keys and values are counted as one matrix.
    """
    layout, muon = settings.layout, settings.muon
    assert muon is not None
    ways = layout.etp if weight.experts else layout.tp
    count = weight.experts // layout.ep if weight.experts else 1
    rows, columns = weight.rows, weight.cols or 1
    ways = 1 if weight.split == "replicated" else ways
    if muon.tp_mode == "blockwise":
        rows, columns = (rows // ways, columns) if weight.split == "column" else (rows, columns // ways)
    side, long = min(rows, columns), max(rows, columns)
    if muon.tp_mode == "distributed" and ways > 1:  # X X^T is as large as the side that no rank splits
        side, long = (columns, rows // ways) if weight.split == "column" else (rows, columns // ways)
    return count * muon.steps * (4.0 * side**2 * long + 2.0 * side**3)
