"""Kernels: fusions, attention, the implementation of layers."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Kernel choices. They change speed and rounding, not what is computed; most need a GPU and a library."""

    transformer_impl: Literal["local", "transformer_engine"] = param("transformer_engine", speed_only=True)
    """Implementation of linear layers and norms; without Transformer Engine the local one is used."""
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] = param("flash", speed_only=True)
    """Attention kernel; without Transformer Engine it is PyTorch's fused attention."""
    attn_impl: str = param(
        "flash_attn",
        built=False,
        refused="belongs to the vision tower of multimodal models, which are not built yet; see attention_backend",
    )
    """Attention kernel of a multimodal model's vision tower."""
    cross_entropy_loss_fusion: bool = param(False, speed_only=True)
    """Computes the cross-entropy over a split vocabulary in one fused kernel."""
    cross_entropy_fusion_impl: Literal["native", "te"] = param(
        "native", built=("native",), refused="gives the loss alone, but objectives weigh each token's log-probability"
    )
    """Fused cross-entropy of megatron-core (native) or of Transformer Engine (te)."""
    no_masked_softmax_fusion: bool = param(False, speed_only=True, negated_aliases=("masked_softmax_fusion",))
    """Computes scaling, mask and softmax of attention separately."""
    no_bias_dropout_fusion: bool = param(False, speed_only=True, negated_aliases=("bias_dropout_fusion",))
    """Computes bias, dropout and residual addition separately."""
    no_bias_swiglu_fusion: bool = param(
        False, speed_only=True, negated_aliases=("bias_swiglu_fusion", "bias_activation_fusion")
    )
    """Computes bias and SwiGLU separately."""
    no_rope_fusion: bool = param(False, speed_only=True, negated_aliases=("rope_fusion", "apply_rope_fusion"))
    """Applies rotary embeddings with plain tensor operations."""
    no_gradient_accumulation_fusion: bool = param(
        False, speed_only=True, negated_aliases=("gradient_accumulation_fusion",)
    )
    """Accumulates weight gradients after the matrix product instead of inside it (the fused version needs apex)."""
