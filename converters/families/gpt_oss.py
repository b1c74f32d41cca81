"""GPT-OSS: `GptOssForCausalLM`; attention sinks, biases everywhere, experts in one tensor for each layer.

Hugging Face's fused experts are the transposes of megatron-core's, and their gate and up rows alternate: we copy them
with strides (`converters.strided_copy`), bit for bit. We dequantise the published checkpoints in MXFP4
(`converters.mxfp4`); we read those in BF16 too.
"""

from __future__ import annotations

from megabatch.converters.families.config_json import Config, decoder, experts_of, size, switch
from megabatch.converters.families.decoder import ATTENTION, EMBEDDING, OUTPUT, TIED, not_made
from megabatch.converters.family import Family
from megabatch.converters.mapping import Experts, Rename, Row, Transposed, WovenGateUp
from megabatch.plan.shape import ModelShape

_OURS, _THEIRS = "decoder.layers.{l}.", "model.layers.{l}."
_FC1, _FC2 = _OURS + "mlp.experts.linear_fc1.", _OURS + "mlp.experts.linear_fc2."
_GATE_UP, _DOWN = _THEIRS + "mlp.experts.gate_up_proj", _THEIRS + "mlp.experts.down_proj"

_MLP: tuple[Row | Experts, ...] = (
    Rename(_OURS + "self_attention.core_attention.softmax_offset", _THEIRS + "self_attn.sinks", ("num_heads",),
           split="column"),
    Rename(_OURS + "pre_mlp_layernorm.weight", _THEIRS + "post_attention_layernorm.weight", ("hidden",)),
    Rename(_OURS + "mlp.router.weight", _THEIRS + "mlp.router.weight", ("experts", "hidden")),
    Rename(_OURS + "mlp.router.bias", _THEIRS + "mlp.router.bias", ("experts",)),
    Experts(WovenGateUp(_FC1 + "weight", _GATE_UP, ("expert_ffn", "hidden"), split="column", transposed=True)),
    Experts(WovenGateUp(_FC1 + "bias", _GATE_UP + "_bias", ("expert_ffn",), split="column")),
    Experts(Transposed(_FC2 + "weight", _DOWN, ("hidden", "expert_ffn"), split="row")),
    Experts(Rename(_FC2 + "bias", _DOWN + "_bias", ("hidden",))),
)  # fmt: skip


def _shape(config: Config) -> ModelShape:
    fields = decoder(
        config,
        model_type="gpt_oss",
        default_architecture="GptOssForCausalLM",
        head_dim=64,
        theta=150000.0,
        epsilon=1e-5,
        tensors_only=True,
    )
    experts, topk = experts_of(config, "num_local_experts", "num_experts")
    bias = switch(config, "attention_bias", default=True)
    return ModelShape(
        **fields | {"sliding_window": size(config, "sliding_window", default=128)},
        add_qkv_bias=bias,
        attention_output_bias=bias,
        num_experts=experts,
        moe_layers=(True,) * fields["num_layers"],
        moe_ffn_hidden_size=fields["ffn_hidden_size"],
        moe_router_topk=topk,
        mlp_bias=True,
        attention_sinks=True,
    )


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM", "GptOssForSequenceClassification", "GptOssForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *_MLP, *OUTPUT),
    shape=_shape,
    hf_config=not_made,
    tied=TIED,
)
