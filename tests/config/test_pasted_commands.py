"""Flags that people already have, in the newer spellings, on the models they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch import Data, Model, Recipe, Resources
from megabatch.config.flags import parse
from megabatch.config.rules.check import check
from megabatch.plan.shape import ModelShape

COMMON = """
    --use_hf --save_safetensors true --sequence_parallel true --recompute_granularity full --recompute_method uniform
    --recompute_num_layers 1 --finetune true --cross_entropy_loss_fusion true --lr 1e-5 --lr_warmup_fraction 0.05
    --min_lr 1e-6 --num_train_epochs 1 --dataset_num_proc 4 --no_save_optim true --no_save_rng true
"""
DENSE = """
    --model Qwen/Qwen2.5-7B-Instruct --dataset org/alpaca-zh#500 org/alpaca-en#500 --tensor_model_parallel_size 2
    --micro_batch_size 16 --global_batch_size 16 --output_dir megatron_output/Qwen2.5-7B-Instruct --save_steps 100
    --max_length 2048 --dataloader_num_workers 4 --gpus_per_node 2
"""
EXPERTS = """
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 --dataset org/data#20000 --load_from_cache_file true
    --moe_permute_fusion true --pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 25
    --tensor_model_parallel_size 4 --expert_model_parallel_size 4 --moe_grouped_gemm true
    --moe_shared_expert_overlap true --moe_aux_loss_coeff 1e-6 --micro_batch_size 1 --global_batch_size 4
    --output_dir megatron_output/Qwen3-30B-A3B --save_steps 500 --max_length 8192 --packing true
    --dataloader_num_workers 8 --moe_expert_capacity_factor 2 --attention_backend flash
"""
LORA = "--tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear --merge_lora false"


def shape(**fields) -> ModelShape:
    known = {
        "architecture": "any",
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "untie_embeddings_and_output_weights": True,
        "norm_epsilon": 1e-6,
        "rotary_base": 1e6,
        "kv_channels": 128,
        "num_query_groups": 4,
    }
    return ModelShape(**known, **fields)


QWEN25_7B = shape(
    model_type="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    add_qkv_bias=True,
)
QWEN3_30B = shape(
    model_type="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_experts=128,
    moe_layers=(True,) * 48,
    moe_ffn_hidden_size=768,
    moe_router_topk=8,
    qk_layernorm=True,
)


@pytest.fixture
def blank() -> Recipe:
    return Recipe(name="pasted", task="sft", model=Model(), data=Data(), resources=Resources(time="12:00:00"))


@pytest.mark.parametrize(("line", "model"), [(DENSE, QWEN25_7B), (EXPERTS, QWEN3_30B)])
def test_full_parameter_commands_pass_every_rule(blank, line, model):
    _, recipe = parse((COMMON + line).split(), blank)
    assert check(recipe, model) == []
    assert (recipe.training.max_epochs, recipe.data.num_workers) == (1, 4 if model is QWEN25_7B else 8)


def test_a_lora_command_passes_every_rule(blank):
    _, recipe = parse((COMMON + DENSE + LORA).split(), blank)
    assert check(recipe, QWEN25_7B) == []
    assert (recipe.tuner.tuner_type, recipe.tuner.target_modules) == ("lora", ("all-linear",))
    assert recipe.bridge.merge_lora is False


def test_the_learning_rate_suits_the_kind_of_training(blank):
    _, recipe = parse(["--tuner_type", "lora", "--min_lr", "5e-5"], blank)
    assert "learning_rate.min_lr" not in {fault.field for fault in check(recipe)}
    full = replace(recipe, tuner=replace(recipe.tuner, tuner_type="full"))
    assert "learning_rate.min_lr" in {fault.field for fault in check(full)}
