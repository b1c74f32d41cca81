"""Conversion of checkpoints, as the converters' command line takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import param


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What `megabatch-convert` does; in a recipe these have no effect and are refused."""

    to_mcore: bool = param(False, built=False)
    """Converts Hugging Face weights to megatron-core's format."""
    to_hf: bool = param(False, built=False)
    """Converts megatron-core weights to Hugging Face's format."""
    test_convert_precision: bool = param(False, built=False)
    """Compares the outputs of both formats after a conversion."""
    test_convert_dtype: Literal["float32", "bfloat16", "float16"] = param("float32", built=False)
    """Type in which that comparison computes."""
    exist_ok: bool = param(False, built=False)
    """Overwrites an existing `save`."""
    device_map: str = param("auto", built=False)
    """Where the Hugging Face model of the comparison is loaded; `cpu` spares GPU memory."""
