"""megatron-core's own models, built on the CPU and filled through the tables; run as a program, saves their logits.

    python mcore_logits.py IDS.npy FOLDER…

writes into each folder the logits and the names that the model asks a checkpoint for.

The trainer builds the families that it trains; here the others are put together from megatron-core's modules, with
norms and attention of ours where its own need CUDA or Transformer Engine. Building adapts megatron-core to the CPU,
which changes the process for good.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.shards import assemble, read_shard
from megabatch.trainer import megatron_cpu
from megabatch.trainer.model.norms import RMSNorm


class ZeroCentredNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), 1 + self.weight, self.eps)


class CausalAttention(nn.Module):
    """[S, B, H, D], [S, B, G, D], [S, B, G, V] → [S, B, H * V]; keys and values may have different dimensions."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def settings(model: HfModel) -> dict[str, Any]:
    """TransformerConfig's fields, from the shape and, for what only numbers depend on, from config.json."""
    shape, config = model.shape, model.config
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": shape.attention_output_bias,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm or shape.multi_latent_attention,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "perform_initialization": False,
        "attention_output_gate": shape.attention_output_gate,
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": 1 if all(shape.moe_layers) else [int(x) for x in shape.moe_layers],
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": shape.moe_shared_expert_gate,
    }
    if shape.moe_router_enable_expert_bias:
        values |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
            "moe_router_num_groups": config["n_group"],
            "moe_router_group_topk": config["topk_group"],
        }
    elif shape.model_type == "deepseek_v2":
        values |= {
            "moe_router_pre_softmax": True,
            "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        }
    if shape.multi_latent_attention:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        values |= {name: getattr(shape, name) for name in latent}
        values |= {"rope_type": "rope", "rotary_base": config["rope_parameters"]["rope_theta"]}
        del values["attention_output_gate"]
    if shape.attention_sinks:
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        values |= {
            "softmax_type": "learnable",
            "activation_func": quick_gelu,
            "activation_func_clamp_value": config["swiglu_limit"],
            "glu_linear_offset": 1.0,
        }
    if shape.post_layernorms:
        values |= {
            "layernorm_zero_centered_gamma": True,
            "activation_func": functools.partial(nn.functional.gelu, approximate="tanh"),
            "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
        }
    if shape.linear_attention_layers:
        values |= {
            "layernorm_zero_centered_gamma": True,
            "linear_conv_kernel_dim": shape.linear_conv_kernel_dim,
            "linear_key_head_dim": shape.linear_key_head_dim,
            "linear_value_head_dim": shape.linear_value_head_dim,
            "linear_num_key_heads": shape.linear_num_key_heads,
            "linear_num_value_heads": shape.linear_num_value_heads,
            "linear_attention_freq": [int(x) for x in shape.linear_attention_layers],
            "experimental_attention_variant": "gated_delta_net",
            "deterministic_mode": True,
        }
    return values


def layer(config: Any, model: HfModel, number: int) -> Any:
    """megatron-core's spec of one layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    shape = model.shape
    norm = ZeroCentredNorm if config.layernorm_zero_centered_gamma else RMSNorm
    spec: Any = get_gpt_layer_local_spec(
        num_experts=shape.num_experts if shape.is_moe_layer(number) else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=shape.multi_latent_attention,
        normalization="RMSNorm",
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = DotProductAttention if shape.attention_sinks else CausalAttention
    if shape.multi_latent_attention:
        from megatron.core.transformer import multi_latent_attention

        # megatron-core 0.16.1 looks for a class of Transformer Engine that it says is there, whether or not it is
        multi_latent_attention.HAVE_TE = False
        attention.q_layernorm = attention.kv_layernorm = norm
    elif shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if shape.post_layernorms:
        attention.linear_proj = parts.mlp.submodules.linear_fc2 = _with_norm_behind(norm)
    if shape.is_linear_attention_layer(number):
        parts.self_attention = _linear_attention(norm)
    return spec


def _with_norm_behind(norm: type) -> type:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Linear(RowParallelLinear):  # type: ignore[misc]
        """Gemma's, named as Megatron-Bridge names it."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config, output_size, config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x)
            return self.post_layernorm(out), bias

    return Linear


def _linear_attention(norm: type) -> Any:
    """The gated delta net as torch computes it; flash-linear-attention, which it is written for, needs a GPU."""
    from megatron.core.ssm import gated_delta_net
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    gated_delta_net.HAVE_FLA = True
    gated_delta_net.l2norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return ModuleSpec(
        module=gated_delta_net.GatedDeltaNet,
        submodules=gated_delta_net.GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=norm, out_proj=RowParallelLinear
        ),
    )


def build(model: HfModel) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    shape = model.shape
    make = MLATransformerConfig if shape.multi_latent_attention else TransformerConfig
    config = make(**settings(model))
    norm = ZeroCentredNorm if config.layernorm_zero_centered_gamma else RMSNorm
    layers = [layer(config, model, number) for number in range(shape.num_layers)]
    rope = model.config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        rotary_base=int(rope["rope_theta"]),
    )
    if shape.post_layernorms:  # Gemma scales its embeddings
        gpt.embedding.register_forward_hook(lambda module, given, out: out * shape.hidden_size**0.5)
    return gpt


_PARTS = {
    "self_attention.in_proj.weight": ("query", "key", "value", "z", "beta", "alpha"),
    "self_attention.conv1d.weight": ("query", "key", "value"),
}
"""Live tensors that are several on disk, one below the other."""


def canonical(name: str, gpt: Any) -> tuple[str, int | None]:
    """A live tensor's name on disk, with Transformer Engine, and its expert."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name, None
    own, rest, expert = gpt.decoder.layers[int(match[1])], match[2], None
    if found := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", rest):
        rest, expert = f"mlp.experts.{found[2]}", int(found[1])
    attention = own.self_attention
    renames = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."} if not hasattr(own.mlp, "router") else {}
    if hasattr(attention, "linear_kv_up_proj"):
        renames |= {f"self_attention.linear_{x}_up_proj.layer_norm_": f"self_attention.{x}_layernorm." for x in
                    ("q", "kv")}  # fmt: skip
    else:
        projection = "in_proj" if hasattr(attention, "in_proj") else "linear_qkv"
        renames[f"self_attention.{projection}.layer_norm_"] = "input_layernorm."
    for to, prefix in renames.items():
        if rest.startswith(prefix):
            rest = to + rest.removeprefix(prefix)
    return f"decoder.layers.{match[1]}.{rest}", expert


def fill(gpt: Any, model: HfModel) -> None:
    """Every parameter and buffer that a checkpoint has, from the table; nothing is left over on either side."""
    values = {(mapped.name, mapped.expert): _value(mapped, model) for mapped in model.tensors}
    live = dict(gpt.named_parameters()) | {k: b for k, b in gpt.named_buffers() if k.endswith("expert_bias")}
    for name, tensor in live.items():
        own, expert = canonical(name, gpt)
        parts = next((_PARTS[tail] for tail in _PARTS if own.endswith(tail)), None)
        names = [own] if parts is None else [f"{own}.{part}" for part in parts]
        value = torch.cat([values.pop((part, expert)) for part in names])
        assert tensor.shape == value.shape, (name, tensor.shape, value.shape)
        tensor.data.copy_(value)
    assert not values, sorted(values)


def _value(mapped: Any, model: HfModel) -> Tensor:
    if mapped.offset:
        (piece,) = mapped.pieces
        data = model.folder.read(piece.hf).data
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(mapped.shape) + mapped.offset
    data = read_shard(model.folder, mapped, tp_rank=0, tp_size=1)
    assert list(assemble(mapped, [data], itemsize=4))
    return torch.frombuffer(data, dtype=torch.float32).view(mapped.shape)


def logits(folder: str, ids: np.ndarray) -> np.ndarray:
    model = open_hf_model(folder)
    gpt = build(model).eval()
    fill(gpt, model)
    tokens = torch.from_numpy(ids)[None]
    positions = torch.arange(ids.shape[0])[None]
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).triu(1)
    (Path(folder) / "mcore_keys.json").write_text(json.dumps(keys(gpt)))
    with torch.no_grad():
        out: np.ndarray = gpt(tokens, positions, mask)[0].float().numpy()
    return out


def keys(gpt: Any) -> dict[str, list[int] | None]:
    """What this model asks a checkpoint for: tensors with their whole shapes, other objects with None."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[str, list[int] | None] = {}

    def add(item: Any) -> None:
        if isinstance(item, ShardedTensorFactory):
            item = item.build()
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, list):
            for one in item:
                add(one)
        elif isinstance(item, ShardedTensor):
            found[item.key] = list(item.global_shape)
        else:
            found[item.unique_key] = None

    add(gpt.sharded_state_dict())
    return found


def main(arguments: list[str]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    importlib.import_module("megatron.core.ssm.gated_delta_net")  # before it is adapted
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    megatron_cpu.adapt()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    ids = np.load(arguments[0])
    for folder in arguments[1:]:
        np.save(Path(folder) / "mcore_logits.npy", logits(folder, ids))


if __name__ == "__main__":
    main(sys.argv[1:])
