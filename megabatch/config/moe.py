"""Mixture of experts, multi-head latent attention and multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass

_BALANCING = (
    "gives each layout another loss or another model: megatron-core (0.16) takes a packed row for one sequence "
    "(seq_aux_loss), sums over the micro-batches before it alone (global_aux_loss), or routes by other scores than "
    "inference (sinkhorn)"
)
_FAMILY = "belongs to families that are not built yet (docs/families.md)"


@dataclass(frozen=True, kw_only=True, slots=True)
class MoE:
    """Experts, router and dispatch. Fields that are None come from the model's config.json."""

    num_experts: int | None = param(None, at_least=1, at_most=100_000)
    """Routed experts of a MoE layer."""
    moe_layer_freq: int | Sequence[int] | None = param(None, at_least=1)
    """Every n-th layer, starting with the first, is a MoE layer; or a list with a 0 or 1 per layer (1 is MoE)."""
    moe_ffn_hidden_size: int | None = param(None, at_least=1, at_most=1 << 32)
    """Width of each expert; None means the dense MLP's for a new model."""
    moe_shared_expert_intermediate_size: int | None = param(None, built=False, refused=_FAMILY, at_least=1)
    """Total width of the shared experts, which process every token."""
    moe_router_topk: int | None = param(None, at_least=1)
    """Experts per token."""
    moe_router_num_groups: int | None = param(None, built=False, refused=_FAMILY, at_least=1)
    """Groups of experts for group-limited routing."""
    moe_router_group_topk: int | None = param(None, built=False, refused=_FAMILY, at_least=1)
    """Groups from which a token may choose its experts."""
    moe_router_pre_softmax: bool | None = param(None)
    """Applies softmax over all experts before choosing, so that the chosen weights do not sum to 1."""
    moe_router_dtype: Literal["none", "fp32", "fp64"] = param("fp32")
    """Type of the routing scores and of the weighted sum of expert outputs; none uses the model's."""
    moe_router_score_function: Literal["softmax", "sigmoid"] | None = param(None, built=("softmax",), refused=_FAMILY)
    """Function from router logits to scores."""
    moe_router_bias_update_rate: float | None = param(None, built=False, refused=_FAMILY, at_least=0)
    """Change of an expert's balancing bias after each global batch."""
    moe_router_enable_expert_bias: bool | None = param(None, built=(False,), refused=_FAMILY)
    """Balances experts with a bias on each expert's score instead of a loss (arXiv:2408.15664)."""
    moe_router_topk_scaling_factor: float | None = param(None, built=False, refused=_FAMILY, above=0)
    """Multiplies the chosen experts' weights."""
    moe_router_load_balancing_type: (
        Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] | None
    ) = param(None, built=("aux_loss", "none"), refused=_BALANCING)
    """Load balancing: a loss over each micro-batch, each sequence or the global batch, optimal transport, or none."""
    moe_aux_loss_coeff: float = param(0.0, at_least=0)
    """Weight of the load-balancing loss; a higher value spreads tokens more evenly but costs quality."""
    moe_z_loss_coeff: float | None = param(None, at_least=0)
    """Weight of the loss that keeps router logits small; None disables it."""
    moe_expert_capacity_factor: float | None = param(None, above=0)
    """Tokens of a micro-batch that an expert accepts, as a multiple of an even share; the rest is dropped. None drops
    nothing."""
    moe_pad_expert_input_to_capacity: bool = param(False)
    """Pads each expert's input to its capacity; needs `moe_expert_capacity_factor`, tp 1 and cp 1."""
    moe_token_drop_policy: Literal["probs", "position"] = param("probs")
    """Which tokens beyond capacity are dropped: the least probable ones or the last ones."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex", "alltoall_seq"] = param(
        "alltoall",
        built=("alltoall", "allgather", "flex"),
        refused="is gone from megatron-core (0.16)",
    )
    """How tokens reach the ranks of their experts. flex is DeepEP's kernels, in bfloat16 on GPUs: before its first
    step each run compares a layer's results with those of alltoall."""
    moe_enable_deepep: bool = param(False)
    """Says what the flex dispatcher does anyway: it uses DeepEP's kernels."""
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = param(
        "deepep",
        built=("deepep",),
        refused="is not built: HybridEP makes its buffers for the first row's length, and rows differ",
    )
    """Kernels of the flex dispatcher."""
    moe_deepep_num_sms: int = param(20, at_least=2)
    """Multiprocessors of a GPU that DeepEP's kernels use; an even number."""
    moe_grouped_gemm: bool = param(True, speed_only=True)
    """Computes a rank's experts in one grouped matrix product if the device supports it."""
    moe_permute_fusion: bool = param(False, speed_only=True)
    """Fuses the sorting of tokens by expert (Transformer Engine)."""
    moe_shared_expert_overlap: bool = param(False, speed_only=True)
    """Computes shared experts while tokens are dispatched; no effect without shared experts."""

    def __post_init__(self) -> None:
        freeze_lists(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2). Fields that are None come from the model's config.json."""

    multi_latent_attention: bool = param(False, built=False)
    """Uses multi-head latent attention."""
    q_lora_rank: int | None = param(None, built=False, at_least=1)
    """Rank of the compressed queries."""
    kv_lora_rank: int | None = param(None, built=False, at_least=1)
    """Rank of the compressed keys and values."""
    qk_head_dim: int | None = param(None, built=False, at_least=1)
    """Dimensions of a query or key head that carry no position."""
    qk_pos_emb_head_dim: int | None = param(None, built=False, at_least=1)
    """Dimensions of a query or key head that carry the position."""
    v_head_dim: int | None = param(None, built=False, at_least=1)
    """Dimensions of a value head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MTP:
    """Multi-token prediction: extra layers after the last one that predict further tokens."""

    mtp_num_layers: int | None = param(None, built=False, at_least=1)
    """Number of further tokens to predict, one layer each; never read from config.json."""
    mtp_loss_scaling_factor: float = param(0.1, built=False, at_least=0)
    """Weight of the mean loss of the MTP layers."""
