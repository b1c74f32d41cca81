"""FP8 tensors with a scale for each block, as DeepSeek-V3 introduced them: `X.weight` and `X.weight_scale_inv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.errors import ConversionError

FP8 = "F8_E4M3"
_SUFFIX = "_scale_inv"
_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Scale:
    """The block scales of an FP8 tensor: the value is the stored number times its block's scale."""

    name: str
    """Tensor of the scales, one for each block."""
    block: tuple[int, int]
    """Rows and columns of a block; the last of each may be cut off."""


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from a config.json. Raises: ConversionError for what is no pair of sizes."""
    block = (config.get("quantization_config") or {}).get("weight_block_size", _BLOCK)
    if len(block) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in block):
        raise ConversionError(f"config.json: quantization_config.weight_block_size={block!r} must be [rows, columns]")
    return (block[0], block[1])


def block_scales(
    config: Mapping[str, Any], names: Iterable[str], found: Mapping[str, TensorInfo]
) -> dict[str, Scale]:
    """The scales of those of the tensors that are stored in FP8.

    Raises: ConversionError for scales that are missing, or not one for each block.
    """
    block = block_of(config)
    scales = {}
    for name in names:
        if name in found and found[name].dtype == FP8:
            scales[name] = _scale(name, found, block)
    return scales


def _scale(name: str, found: Mapping[str, TensorInfo], block: tuple[int, int]) -> Scale:
    own, scale = found[name], found.get(name + _SUFFIX)
    if scale is None:
        raise ConversionError(f"{name} {list(own.shape)} is {FP8} and has no {name + _SUFFIX} with its scales")
    blocks = tuple(-(-size // by) for size, by in zip(own.shape, block, strict=False))
    if len(own.shape) != 2 or scale.shape != blocks or scale.dtype != "F32":
        raise ConversionError(
            f"{name + _SUFFIX} {list(scale.shape)} {scale.dtype} does not scale {name} {list(own.shape)} in blocks of "
            f"{block[0]} x {block[1]}; {list(blocks)} F32 is expected"
        )
    return Scale(name + _SUFFIX, block)
