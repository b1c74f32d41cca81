"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass

_VISION = "belongs to the vision tower of multimodal models, which are not built yet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """Trades time for memory: which activations are recomputed in the backward pass."""

    recompute_granularity: Literal["full", "selective", "none"] = param("selective")
    """Recomputes whole transformer layers, only `recompute_modules`, or nothing."""
    recompute_method: Literal["uniform", "block"] | None = param(None)
    """For `full`: all layers in units of `recompute_num_layers` (uniform), or only that many first layers of a stage
    (block)."""
    recompute_num_layers: int | None = param(None, at_least=1)
    """For `full`: layers per unit (uniform), or recomputed layers per stage (block)."""
    recompute_modules: Sequence[Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe"]] = param(
        ("core_attn",),
        built=("core_attn", "moe_act", "layernorm", "mlp", "moe"),
        refused="belongs to multi-latent attention, which is not built yet",
    )
    """For `selective`: attention scores, expert activations, norms, MLA's up-projections, dense MLPs, MoE layers."""
    vit_gradient_checkpointing: bool = param(True, built=False, refused=_VISION)
    """Recomputes a multimodal model's vision tower."""
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = param(
        None, built=False, refused=_VISION, aliases=("vit_gradient_checkpointing_kwargs",)
    )
    """Arguments of `torch.utils.checkpoint` for the vision tower; on the command line as a JSON object."""

    def __post_init__(self) -> None:
        freeze_lists(self)
