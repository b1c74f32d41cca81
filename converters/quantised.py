"""Block-scaled FP8 in a Hugging Face folder: `X` in F8_E4M3 beside `X_scale_inv`, one scale for each block of it.

We write DeepSeek-V3's layout: weights of linear layers are quantised; embeddings, output layer, norms, routers and the
MTP projection are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.dtypes import FP8
from megabatch.converters.mxfp4 import METHOD, Mxfp4
from megabatch.converters.safe_regex import matches
from megabatch.errors import ConversionError
from megabatch.values import dataclass

SUFFIX = "_scale_inv"
_FORMATS = ("e4m3", None)
DEEPSEEK_V3 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
"""DeepSeek-V3's `quantization_config`."""
LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj_qkvz", "out_proj", "w1", "w2", "w3",
)  # fmt: skip
"""Modules whose weights are quantised."""
_NEVER_CONVERTED = ("embed_tokens", "lm_head", "score", "gate", "router")
"""Modules that loaders never quantise, even if config.json does not list them."""
PLAIN = "BF16"
"""dtype of the dequantised weights."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """How the weights of a folder are quantised."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""
    config: Mapping[str, Any]
    """`quantization_config`."""

    @property
    def powers_of_two(self) -> bool:
        """Whether scales are powers of two, as in DeepSeek-V3.1."""
        return self.config.get("scale_fmt") == "ue8m0"

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of a model is quantised where it is written."""
        module = name.removesuffix(".weight")
        left = self.config.get("modules_to_not_convert") or ()
        return (
            len(shape) == 2
            and name.endswith(".weight")
            and module.rpartition(".")[2] in LINEAR
            and not any(module.endswith(name) or _begins(module, name) for name in left)
        )

    def written(self, plain: Iterable[str]) -> dict[str, Any]:
        """`quantization_config` of a folder with these matrices that are not quantised."""
        modules = (name.removesuffix(".weight") for name in plain)
        left = sorted(module for module in modules if module.rpartition(".")[2] not in _NEVER_CONVERTED)
        known = self.config.get("modules_to_not_convert") or []
        return {**self.config, **({"modules_to_not_convert": sorted({*known, *left})} if known or left else {})}

    def scales_of(self, name: str) -> str:
        return name + SUFFIX


def _begins(module: str, pattern: str) -> bool:
    try:
        return matches(rf"(?:{pattern})(?:\.|$)", module)
    except ConversionError as error:
        raise ConversionError(f"config.json: quantization_config: modules_to_not_convert: {error}") from error


def quantised(config: Mapping[str, Any]) -> Quantised | Mxfp4 | None:
    """The quantisation in config.json's `quantization_config`, or None for plain weights.

    Raises: ConversionError for any kind but block-scaled FP8, and MXFP4.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if isinstance(given, Mapping) and given.get("quant_method") == METHOD:
        return Mxfp4()
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None
    if block is None or not _is_block(block) or given.get("quant_method") != "fp8" or given.get("fmt") not in _FORMATS:
        raise ConversionError(
            f"config.json: quantization_config={given!r} is not supported; block-scaled FP8 is (quant_method fp8 with "
            "weight_block_size), and mxfp4; for others, QLoRA's too, use the unquantised checkpoint"
        )
    return Quantised((block[0], block[1]), given)


def as_deepseek_v3() -> Quantised:
    """For a model whose own config.json does not say how it is quantised."""
    return Quantised((128, 128), DEEPSEEK_V3)


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def plain(found: Mapping[str, TensorInfo], how: Quantised | Mxfp4) -> dict[str, TensorInfo]:
    """The folder's tensors after applying every scale.

    Raises: ConversionError naming weights without scales, scales without weights, and scales of a wrong shape.
    """
    if isinstance(how, Mxfp4):
        return how.plain(found)
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
