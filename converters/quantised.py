"""Block-scaled FP8 in a Hugging Face folder: `X` in F8_E4M3 beside `X_scale_inv`, one scale for each block of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.dtypes import FP8
from megabatch.errors import ConversionError

SUFFIX = "_scale_inv"
_FORMATS = ("e4m3", None)
PLAIN = "BF16"
"""dtype of the weights once they are made plain."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """How the weights of a folder are quantised."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""

    def scales_of(self, name: str) -> str:
        return name + SUFFIX


def quantised(config: Mapping[str, Any]) -> Quantised | None:
    """What config.json's `quantization_config` says, or None for plain weights.

    Raises: ConversionError for any kind but block-scaled FP8.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None
    if block is None or not _is_block(block) or given.get("quant_method") != "fp8" or given.get("fmt") not in _FORMATS:
        raise ConversionError(
            f"config.json: quantization_config={given!r} is not supported; block-scaled FP8 is (quant_method fp8 with "
            "weight_block_size), for others use the unquantised checkpoint"
        )
    return Quantised((block[0], block[1]))


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def plain(found: Mapping[str, TensorInfo], how: Quantised) -> dict[str, TensorInfo]:
    """The folder's tensors as they are once every scale is applied.

    Raises: ConversionError naming weights without scales, scales without weights, and scales of a wrong shape.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in found.items():
        weight = name.removesuffix(SUFFIX)
        if weight != name and weight in found and found[weight].dtype == FP8:
            continue
        result[name] = _plain(name, info, found, how) if info.dtype == FP8 else info
    return result


def _plain(name: str, info: TensorInfo, found: Mapping[str, TensorInfo], how: Quantised) -> TensorInfo:
    scale = found.get(how.scales_of(name))
    if scale is None:
        raise ConversionError(f"{name} {list(info.shape)} {FP8}: {how.scales_of(name)} is missing")
    *lead, rows, columns = info.shape if len(info.shape) > 1 else (1, *info.shape)
    expected = (*lead, -(-rows // how.block[0]), -(-columns // how.block[1]))
    if scale.shape != expected or scale.dtype not in ("F32", "BF16", "F16"):
        raise ConversionError(
            f"{how.scales_of(name)} {list(scale.shape)} {scale.dtype}: {list(expected)} of F32, BF16 or F16 is needed "
            f"for {name} {list(info.shape)} in blocks of {list(how.block)}"
        )
    return TensorInfo(PLAIN, info.shape)
