"""Conversion of checkpoints: the parameters of the converters' command line."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass

_CONVERTS = "is an option of megabatch-convert (docs/converters.md)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Parameters of `megabatch-convert`; they have no effect in a recipe and are refused."""

    to_mcore: bool = param(False, built=False, refused=_CONVERTS)
    """Converts Hugging Face weights to megatron-core's format."""
    to_hf: bool = param(False, built=False, refused=_CONVERTS)
    """Converts megatron-core weights to Hugging Face's format."""
    test_convert_precision: bool = param(False, built=False, refused=_CONVERTS)
    """Compares the outputs of both formats after a conversion."""
    test_convert_dtype: Literal["float32", "bfloat16", "float16"] = param("float32", built=False, refused=_CONVERTS)
    """Type used for that comparison."""
    exist_ok: bool = param(False, built=False, refused=_CONVERTS)
    """Overwrites an existing `save`."""
    device_map: str = param("auto", built=False, refused=_CONVERTS)
    """Where the Hugging Face model of the comparison is loaded; `cpu` saves GPU memory."""
