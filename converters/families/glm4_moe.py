"""GLM-4.5, 4.6 and Air: `Glm4MoeForCausalLM`; experts beside shared ones, behind a few dense layers.

The rotation of half of each head's dimensions needs no permutation. Layers of multi-token prediction are converted;
transformers does not load them.
"""

from __future__ import annotations

from megabatch.converters.families.config_json import (
    Config,
    count,
    decoder,
    experts_of,
    leading_dense_layers,
    size,
    switch,
)
from megabatch.converters.families.decoder import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    EXPERT_BIAS,
    MTP_COPIES,
    OUTPUT,
    TIED,
    moe_mlp,
    mtp,
    not_made,
    shared_experts,
)
from megabatch.converters.family import Family
from megabatch.converters.mapping import Experts, Row
from megabatch.plan.shape import ModelShape

_LAYER: tuple[Row | Experts, ...] = (*ATTENTION, *DENSE_MLP, *moe_mlp(), EXPERT_BIAS, *shared_experts())


def _shape(config: Config) -> ModelShape:
    fields = decoder(
        config,
        model_type="glm4_moe",
        default_architecture="Glm4MoeForCausalLM",
        head_dim=None,
        epsilon=1e-5,
        tensors_only=True,
    )
    experts, topk = experts_of(config, "n_routed_experts", "num_local_experts", "num_experts")
    width = size(config, "moe_intermediate_size")
    return ModelShape(
        **fields,
        add_qkv_bias=switch(config, "attention_bias"),
        qk_layernorm=switch(config, "use_qk_norm"),
        num_experts=experts,
        moe_layers=leading_dense_layers(config, layers=fields["num_layers"]),
        moe_ffn_hidden_size=width,
        moe_router_topk=topk,
        moe_shared_expert_intermediate_size=count(config, "n_shared_experts") * width or None,
        moe_router_enable_expert_bias=True,
        mtp_num_layers=count(config, "num_nextn_predict_layers", "num_mtp_layers") or None,
    )


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    rows=(*EMBEDDING, *_LAYER, *mtp(_LAYER), *OUTPUT),
    shape=_shape,
    hf_config=not_made,
    tied=TIED,
    mtp_copies=MTP_COPIES,
)
