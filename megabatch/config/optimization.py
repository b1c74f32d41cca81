"""Learning rate, optimizer and number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import param


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """Linear warmup to `lr`, then a decay to `min_lr`."""

    lr: float | None = param(None, aliases=("learning_rate",), above=0)
    """Peak learning rate; None means 1e-5 for full-parameter training and 1e-4 for LoRA."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = param(
        "cosine", built=("cosine", "linear", "constant")
    )
    """Shape of the decay after warmup."""
    lr_decay_iters: int | None = param(None, at_least=1)
    """Step at which the decay reaches `min_lr`; None means the last step, known once the data is prepared."""
    lr_warmup_iters: int = param(0, at_least=0)
    """Warmup steps; set either this or the fraction."""
    lr_warmup_fraction: float | None = param(None, at_least=0, below=1)
    """Warmup as a fraction of `lr_decay_iters`."""
    min_lr: float = param(0.0, at_least=0)
    """Lowest learning rate of the decay."""
    vit_lr: float | None = param(None, built=False, above=0)
    """Learning rate of a multimodal model's vision tower; None means `lr`."""
    aligner_lr: float | None = param(None, built=False, above=0)
    """Learning rate of a multimodal model's aligner; None means `lr`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Optimizer, regularisation, and the place and precision of the optimizer state."""

    optimizer: Literal["adam", "sgd"] = param("adam")
    """Adam is AdamW: weight decay is decoupled from the gradient."""
    weight_decay: float = param(0.1, at_least=0)
    """Weight decay, multiplied by the learning rate; norms and biases are not decayed."""
    clip_grad: float = param(1.0, at_least=0)
    """Gradients with a larger L2 norm are scaled down to it; 0 disables clipping. Logs show the norm before
    clipping."""
    adam_beta1: float = param(0.9, at_least=0, below=1)
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = param(0.95, at_least=0, below=1)
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = param(1e-8, above=0)
    """Added to Adam's denominator."""
    sgd_momentum: float = param(0.9, at_least=0, below=1)
    """Momentum of sgd."""
    apply_wd_to_qk_layernorm: bool = param(False, built=False)
    """Also decays the weights of query and key norms (Qwen3-Next)."""
    optimizer_cpu_offload: bool = param(False, built=False)
    """Keeps optimizer state in host memory."""
    optimizer_offload_fraction: float = param(1.0, built=False, at_least=0, at_most=1)
    """Fraction of the optimizer state to offload."""
    use_precision_aware_optimizer: bool = param(False, built=False)
    """Allows optimizer state in the types below (Transformer Engine)."""
    main_grads_dtype: Literal["fp32", "bf16"] = param("fp32", built=False)
    """Type of the accumulated gradients; needs the precision-aware optimizer."""
    main_params_dtype: Literal["fp32", "fp16"] = param("fp32", built=False)
    """Type of the optimizer's copy of the weights; needs the precision-aware optimizer."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = param("fp32", built=False)
    """Type in which Adam's mean of gradients is stored; needs the precision-aware optimizer."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = param("fp32", built=False)
    """Type in which Adam's mean of squared gradients is stored; needs the precision-aware optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of forward and backward; fp32 copies of parameters and optimizer state exist in addition."""

    fp16: bool | None = param(None, built=(False,))
    """Half precision with loss scaling; None follows `torch_dtype`."""
    bf16: bool | None = param(None)
    """bfloat16; None follows `torch_dtype`."""
    apply_query_key_layer_scaling: bool | None = param(None, built=(False,))
    """Divides attention scores by the layer's number, for fp16; None means yes with fp16."""
    attention_softmax_in_fp32: bool = param(True, built=False)
    """Computes the attention softmax in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8:
    """8-bit floating point through Transformer Engine."""

    fp8_format: Literal["e4m3", "hybrid"] | None = param(None, built=False)
    """e4m3 everywhere, or e4m3 forward and e5m2 backward (hybrid); None disables FP8."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = param("delayed", built=False)
    """How scales are computed; blockwise needs CUDA 12.9."""
    fp8_amax_history_len: int = param(1024, built=False, at_least=1)
    """Steps of history of largest values (delayed scaling)."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = param("max", built=False)
    """How a scale is computed from that history."""
    fp8_param_gather: bool = param(False, built=False)
    """Keeps and gathers the weights in FP8."""
