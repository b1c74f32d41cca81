"""Names of live parameters → canonical names of the mapping tables: Transformer Engine's, with global layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_LOCAL_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_GROUPED_EXPERT = re.compile(r"^(mlp\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")


def unwrap(chunk: nn.Module) -> Any:
    """The model inside DDP and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def named_parameters(
    chunks: Sequence[nn.Module], *, first_expert: int
) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """(canonical name, expert or None, parameter) of every parameter of these bare models.

    Args: first_expert: global index of this rank's first expert in each mixture-of-experts layer.
    """
    for model in chunks:
        for name, parameter in model.named_parameters():
            canonical, expert = _canonical(name, model)
            yield canonical, None if expert is None else first_expert + expert, parameter


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
