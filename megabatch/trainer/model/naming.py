"""Names of live parameters → canonical names of the mapping tables: Transformer Engine's, with global layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_LOCAL_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_GROUPED_EXPERT = re.compile(r"^(mlp\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")
_ADAPTER = re.compile(r"^(.*)\.lora\.(\w+)\.(?:(\d+)\.)?([AB])$")


def unwrap(chunk: nn.Module) -> Any:
    """The model inside DDP and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def named_parameters(
    chunks: Sequence[nn.Module], *, first_expert: int, adapter: str | None = None
) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """(canonical name, expert or None, parameter) for every parameter of these bare models, or of one adapter.

    Args: first_expert: global index of this rank's first expert in each mixture-of-experts layer.
    """
    for model in chunks:
        for name, parameter in model.named_parameters():
            layer, of, side = _of_adapter(name)
            if of != adapter:
                continue
            canonical, expert = _canonical(layer, model)
            named = canonical if side is None else adapter_name(canonical, side)
            yield named, None if expert is None else first_expert + expert, parameter


def named_layers(chunk: Any, *, first_expert: int) -> list[tuple[str, int | None, nn.Module]]:
    """(canonical name of a weight, expert or None, layer) for every module of a bare model that has a weight; a layer
    of several experts comes once for each of them."""
    found = []
    for name, module in chunk.named_modules():
        for weight in weight_names(module):
            canonical, expert = _canonical(f"{name}.{weight}", chunk)
            found.append((canonical, None if expert is None else first_expert + expert, module))
    return found


def weight_names(layer: Any) -> list[str]:
    """Names of a layer's matrices: `weight`, or those of its experts if one layer is all of a rank's."""
    if layer._parameters.get("weight") is not None:
        return ["weight"]
    return [f"weight{i}" for i in range(getattr(layer, "num_gemms", 0))]


def adapter_name(weight: str, side: str) -> str:
    """The canonical name of an adapter's A or B, from that of its layer's weight."""
    stem = weight.removesuffix("weight")
    return f"{stem}lora_embedding_{side}" if weight.startswith("embedding.") else f"{stem}lora_{side}.weight"


def is_of_adapter(name: str) -> bool:
    """Whether a live parameter belongs to an adapter, by its name."""
    return _ADAPTER.match(name) is not None


def _of_adapter(name: str) -> tuple[str, str | None, str | None]:
    """(name of the layer's weight, adapter, matrix); for a parameter of no adapter, (its name, None, None)."""
    match = _ADAPTER.match(name)
    return (name, None, None) if match is None else (f"{match[1]}.weight{match[3] or ''}", match[2], match[4])


def _canonical(name: str, model: Any) -> tuple[str, int | None]:
    match = _LAYER.match(name)
    if match is None:
        return name, None
    layer = model.decoder.layers[int(match[1])]
    rest, expert = _expert(match[2])
    if rest.startswith("input_layernorm.") and not hasattr(layer.self_attention, "linear_kv_down_proj"):
        rest = rest.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    elif rest.startswith("pre_mlp_layernorm.") and not hasattr(layer.mlp, "router"):
        rest = rest.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return f"decoder.layers.{layer.layer_number - 1}.{rest}", expert


def _expert(name: str) -> tuple[str, int | None]:
    if match := _LOCAL_EXPERT.match(name):
        return f"mlp.experts.{match[2]}", int(match[1])
    if match := _GROUPED_EXPERT.match(name):
        return match[1], int(match[2])
    return name, None
