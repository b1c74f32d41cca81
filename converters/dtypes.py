"""dtype names on the command line and in safetensors, and which a conversion writes."""

from __future__ import annotations

from megabatch.errors import ConversionError

NAMES = {
    "bfloat16": "BF16", "bf16": "BF16",
    "float16": "F16", "fp16": "F16", "half": "F16",
    "float32": "F32", "fp32": "F32", "float": "F32",
}  # fmt: skip
"""Spellings of `--torch_dtype`."""
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""torch's names."""
FP8 = "F8_E4M3"
"""Eight bits, without infinities: what block-scaled checkpoints hold."""


def read_dtype(text: str | None) -> str | None:
    """safetensors' name of a dtype, None for None. Raises: ConversionError naming the spellings."""
    if text is None:
        return None
    name = NAMES.get(text.removeprefix("torch.").lower())
    if name is None:
        raise ConversionError(f"torch_dtype={text!r} is not known; write bfloat16, float16 or float32")
    return name
