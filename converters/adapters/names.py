"""Parses and builds PEFT's tensor names in adapter_model.safetensors.

Where two parameters of one module (all experts' `gate_up_proj` and `down_proj`) have adapters, PEFT wraps the module
twice: the one that comes last in the module has the outer wrapper, and the other's names have `base_layer` inside.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from megabatch.errors import ConversionError

PREFIX = "base_model.model."
Side = Literal["A", "B"]
_SIDES: dict[str, tuple[Side, bool]] = {
    ".lora_A.weight": ("A", False), ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True), ".lora_embedding_B": ("B", True),
}  # fmt: skip
_REFUSED = {
    ".lora_magnitude_vector": "DoRA", ".lora_magnitude_vector.weight": "DoRA", ".lora_B.bias": "lora_bias",
}  # fmt: skip
BASE = ".base_layer"


class Name(NamedTuple):
    """The parsed name of an adapter's tensor."""

    module: str
    """Of the base model, `base_layer` of wrappers of parameters included."""
    side: Side | None
    """None for a whole tensor of the base model, whose name is then `module`."""
    embedding: bool = False


def parse(name: str) -> Name:
    """Raises: ConversionError for names that PEFT's LoRA does not produce, or that we refuse."""
    if not name.startswith(PREFIX):
        raise ConversionError(f"{name} is not a tensor of a LoRA adapter: PEFT's begin with {PREFIX}")
    rest = name.removeprefix(PREFIX)
    for suffix, (side, embedding) in _SIDES.items():
        if rest.endswith(suffix):
            return Name(rest.removesuffix(suffix), side, embedding)
    for suffix, what in _REFUSED.items():
        if rest.endswith(suffix):
            raise ConversionError(f"{name}: {what} is not supported")
    if ".lora_" in rest:
        raise ConversionError(f"{name} is not a tensor of a LoRA adapter that PEFT saves")
    module, dot, leaf = rest.rpartition(".")
    return Name(module.removesuffix(BASE) + dot + leaf, None)


def low_rank_name(module: str, side: Side, *, embedding: bool = False) -> str:
    """The tensor's name in adapter_model.safetensors."""
    return f"{PREFIX}{module}.lora_embedding_{side}" if embedding else f"{PREFIX}{module}.lora_{side}.weight"


def whole_name(tensor: str, *, wrapped: bool) -> str:
    """Of a whole tensor; `wrapped` where its module has an adapter besides."""
    module, dot, leaf = tensor.rpartition(".")
    return f"{PREFIX}{module}{BASE if wrapped else ''}{dot}{leaf}"
