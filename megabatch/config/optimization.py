"""Learning rate, optimizer and number formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass

_SCALED = "keeps numbers with a scale beside them, which checkpoints do not hold"


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """Linear warmup to `lr`, then a decay to `min_lr`, by optimizer steps that changed parameters."""

    lr: float | None = param(None, aliases=("learning_rate",), above=0)
    """Peak learning rate; None means 1e-5 for full-parameter training and 1e-4 for LoRA."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = param("cosine")
    """Shape of the decay after warmup. inverse-square-root: `lr * sqrt(warmup / step)`, at least `min_lr`. WSD
    (warmup, stable, decay): `lr` until the last `lr_wsd_decay_iters` steps of `lr_decay_iters`. constant never
    decays."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = param("exponential")
    """Shape of WSD's decay, over its fraction r: 2 * 0.5^r - 1, 1 - r, (1 + cos(pi r)) / 2 or 1 - sqrt(r)."""
    lr_wsd_decay_iters: int | None = param(None, at_least=1)
    """Steps of WSD's decay."""
    lr_decay_iters: int | None = param(None, at_least=1)
    """Step at which the decay reaches `min_lr`; None means the last step, known once the data is prepared."""
    lr_warmup_iters: int = param(0, at_least=0)
    """Warmup steps; set either this or the fraction."""
    lr_warmup_fraction: float | None = param(None, at_least=0, below=1)
    """Warmup as a fraction of `lr_decay_iters`."""
    lr_warmup_init: float = param(0.0, at_least=0)
    """Learning rate at which warmup begins."""
    min_lr: float = param(0.0, at_least=0)
    """Lowest learning rate of the decay."""
    vit_lr: float | None = param(None, built=False, above=0)
    """Learning rate of a multimodal model's vision tower; None means `lr`."""
    aligner_lr: float | None = param(None, built=False, above=0)
    """Learning rate of a multimodal model's aligner; None means `lr`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Optimizer, regularisation, and the place and precision of the optimizer state."""

    optimizer: Literal["adam", "sgd", "muon"] = param("adam")
    """Adam is AdamW: weight decay is decoupled from the gradient. Muon updates the matrices of layers, routers too;
    AdamW then updates embedding, output layer, heads, norms and biases. sgd and muon need
    `use_distributed_optimizer=False`."""
    weight_decay: float = param(0.1, at_least=0)
    """Weight decay, multiplied by the learning rate; norms and biases are not decayed."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = param("constant")
    """How weight decay goes from `start_weight_decay` to `end_weight_decay` over the run's steps; constant stays at
    `weight_decay`."""
    start_weight_decay: float | None = param(None, at_least=0)
    """Weight decay of the first step, where it changes."""
    end_weight_decay: float | None = param(None, at_least=0)
    """Weight decay of the last step, at least `start_weight_decay`."""
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
    muon_momentum: float = param(0.95, at_least=0, below=1)
    """Decay of Muon's mean of gradients."""
    muon_use_nesterov: bool = param(False, aliases=("muon_nesterov",))
    """Orthogonalizes the mean of that mean and the gradient, weighed by `muon_momentum`, as in the paper."""
    muon_lr: float | None = param(None, above=0)
    """Peak learning rate of Muon's matrices; None means `lr`, which is then that of all parameters."""
    muon_min_lr: float | None = param(None, at_least=0)
    """Lowest learning rate of their decay; None means `min_lr`."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = param("spectral")
    """What an orthogonalized matrix of `out` rows and `in` columns is multiplied with. spectral: sqrt(max(out, in)),
    so that an update's root mean square is about `muon_extra_scale_factor`, whatever the shape; unit_rms_norm:
    sqrt(out / in); shape_scaling: sqrt(max(1, out / in))."""
    muon_extra_scale_factor: float = param(1.0, above=0)
    """Multiplied with that. With spectral, 0.2 makes updates about as large as AdamW's, whose learning rates then
    serve Muon too (arXiv:2502.16982, eq. 4)."""
    muon_split_qkv: bool = param(True)
    """Orthogonalizes queries, keys and values of all heads as a matrix each, not as one."""
    muon_num_ns_steps: int = param(5, at_least=1)
    """Steps of Newton-Schulz that orthogonalize a matrix."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express"] = param("quintic")
    """Coefficients of these steps. simple: the same in each; quintic: five sets, in turn; polar_express: eight
    (arXiv:2505.16932), the last of which is repeated."""
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = param("medium")
    """Precision of their matrix products: fp32, TensorFloat-32 on GPUs that have it, or bfloat16."""
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = param("duplicated")
    """How tensor-parallel ranks orthogonalize a matrix that they split. duplicated: each all of it, which it gathers;
    distributed: together, which exchanges products instead, up to rounding the same; blockwise: each its own part as a
    matrix by itself, without exchange, so that every tensor parallel size computes other updates."""
    apply_wd_to_qk_layernorm: bool = param(False)
    """Also decays the weights of query and key norms (Qwen3-Next), towards 0."""
    optimizer_cpu_offload: bool = param(False)
    """Keeps fp32 main weights and Adam's state in host memory and updates them there; needs Adam and the distributed
    optimizer."""
    optimizer_offload_fraction: float = param(1.0, at_least=0, at_most=1)
    """Fraction of each rank's part of the optimizer to offload, rounded up to whole parameters; needs
    `optimizer_cpu_offload`."""
    overlap_cpu_optimizer_d2h_h2d: bool = param(False, speed_only=True)
    """On GPUs, copies gradients and new weights beside the updates of other parameters; needs
    `optimizer_cpu_offload`."""
    pin_cpu_grads: bool = param(True, speed_only=True)
    """On GPUs, gradients of `optimizer_cpu_offload` arrive in page-locked host memory."""
    use_precision_aware_optimizer: bool = param(False)
    """Allows gradients and optimizer state in the types below; needs bfloat16 weights, the distributed optimizer, GPUs
    and Transformer Engine's Adam. With `optimizer_cpu_offload`, which has its own Adam, it allows `main_grads_dtype`
    alone."""
    main_grads_dtype: Literal["fp32", "bf16"] = param("fp32")
    """Type in which gradients are accumulated and reduced; needs the precision-aware optimizer."""
    main_params_dtype: Literal["fp32", "fp16"] = param("fp32", built=("fp32",), refused=_SCALED)
    """Type of the optimizer's copy of the weights; needs the precision-aware optimizer."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = param("fp32", built=("fp32", "bf16"), refused=_SCALED)
    """Type in which Adam's mean of gradients is stored; needs the precision-aware optimizer."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = param("fp32", built=("fp32", "bf16"), refused=_SCALED)
    """Type in which Adam's mean of squared gradients is stored; needs the precision-aware optimizer."""


def undistributed(group: Optimizer) -> Optimizer:
    """The same updates without the distributed optimizer: state in fp32 and on the device, as gradients are."""
    return replace(
        group,
        optimizer_cpu_offload=False,
        optimizer_offload_fraction=1.0,
        use_precision_aware_optimizer=False,
        main_grads_dtype="fp32",
        exp_avg_dtype="fp32",
        exp_avg_sq_dtype="fp32",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of forward and backward; fp32 copies of parameters and optimizer state exist in addition."""

    fp16: bool | None = param(None)
    """Half precision with a dynamic loss scale; None follows `torch_dtype`."""
    bf16: bool | None = param(None)
    """bfloat16; None follows `torch_dtype`."""
    apply_query_key_layer_scaling: bool | None = param(None, speed_only=True)
    """Divides attention scores by the layer's number and multiplies them again before the softmax, so that fp16 scores
    do not overflow; None means yes with fp16. Only Transformer Engine's unfused attention has scores in fp16."""
    attention_softmax_in_fp32: bool = param(True, speed_only=True)
    """Has no effect: every attention kernel computes its softmax in fp32."""
    initial_loss_scale: float = param(2.0**32, above=0)
    """First loss scale of fp16. While gradients overflow it is halved, at a step each that changes no parameter."""
    min_loss_scale: float = param(1.0, above=0)
    """Smallest loss scale of fp16; the run ends where gradients overflow even so."""
    loss_scale_window: int = param(1000, at_least=1)
    """Steps without overflow after which the loss scale is doubled."""
    hysteresis: int = param(2, at_least=1)
    """Which overflow since the loss scale was last doubled is the first to halve it, as each further one does."""


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
