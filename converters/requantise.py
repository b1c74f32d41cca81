"""Plans block-scaled FP8 output: in place of a tensor of floats, the FP8 numbers and their scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.dtypes import FP8
from megabatch.converters.engine.plan import Blocks, Tensor
from megabatch.converters.quantised import Quantised
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

Parts = Sequence[Tensor]
"""A tensor by leading index, or the whole of it."""


def requantised(
    name: str, shape: tuple[int, ...], parts: Parts, how: Quantised
) -> Iterator[tuple[str, TensorInfo, Parts]]:
    """The two tensors that a matrix of a Hugging Face folder becomes, each with its description.

    Raises: ConversionError for a tensor that is no matrix of rows.
    """
    if len(parts) != 1 or len(shape) != 2 or parts[0].arrangement is not None:
        raise ConversionError(f"{name} {list(shape)}: this is not a matrix that block-scaled FP8 supports")
    (rows, columns), (height, width) = shape, how.block
    down, across = -(-rows // height), -(-columns // width)
    blocks = Blocks(height, width, how.powers_of_two, rows, columns, "weights")
    weights = parts[0]._replace(dtype=FP8, row_bytes=columns, blocks=blocks)
    yield name, TensorInfo(FP8, shape), [weights]
    scales = weights._replace(
        shape=(down, across),
        dtype="F32",
        rows=down,
        row_bytes=across * ITEMSIZE["F32"],
        blocks=blocks._replace(makes="scales"),
    )
    yield how.scales_of(name), TensorInfo("F32", scales.shape), [scales]
