"""Mixtral: `MixtralForCausalLM`; Mistral's attention, and in every layer experts whose chosen weights sum to one.

A folder has experts as `block_sparse_moe.experts.N.{w1,w3,w2}`; transformers 5 has them in memory, and in folders
saved with `save_original_format=False`, as fused tensors under the names of the other families.
"""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import Config, decoder, decoder_config, experts_of
from megabatch.converters.families.decoder import ATTENTION, EMBEDDING, OUTPUT, ROTARY_BUFFERS, TIED, moe_mlp
from megabatch.converters.families.mistral import sliding_window
from megabatch.converters.family import Family
from megabatch.plan.shape import ModelShape


def _shape(config: Config) -> ModelShape:
    fields = decoder(
        config,
        model_type="mixtral",
        default_architecture="MixtralForCausalLM",
        head_dim=None,
        theta=1e6,
        epsilon=1e-5,
    )
    experts, topk = experts_of(config, "num_local_experts", "num_experts")
    window = sliding_window(config, positions=fields["max_position_embeddings"], default=None)
    return ModelShape(
        **fields | {"sliding_window": window},
        num_experts=experts,
        moe_layers=(True,) * fields["num_layers"],
        moe_ffn_hidden_size=fields["ffn_hidden_size"],
        moe_router_topk=topk,
    )


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {
        **decoder_config(shape, dtype=dtype, **token_ids),
        "intermediate_size": shape.moe_ffn_hidden_size,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": shape.sliding_window,
    }


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM", "MixtralForSequenceClassification", "MixtralForTokenClassification"),
    rows=(
        *EMBEDDING,
        *ATTENTION,
        *moe_mlp(
            router="block_sparse_moe.gate.weight",
            gate_up="block_sparse_moe.experts.{e}.{w1,w3}.weight",
            down="block_sparse_moe.experts.{e}.w2.weight",
        ),
        *OUTPUT,
    ),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
)
