"""Divisibility for tensor, sequence and expert parallelism."""

from __future__ import annotations

import pytest

from megabatch.config.rules import parallelism

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

HALF = {"model": {"torch_dtype": "bfloat16"}}
CP2 = {"context_parallel_size": 2}

THREE_GROUPS = {"num_attention_heads": 12, "num_query_groups": 3, "kv_channels": 8}

CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        parallelism.tensor_parallel_divides,
        "dense",
        {"parallel": {"tensor_model_parallel_size": 2}, "model": THREE_GROUPS},
        {"parallel": {"tensor_model_parallel_size": 6}, "model": THREE_GROUPS},
        "parallel.tensor_model_parallel_size",
        ["num_query_groups=3 or be a multiple", "try 1 or 3"],
    ),
    (
        parallelism.tensor_parallel_divides,
        "given dense",
        {"parallel": {"tensor_model_parallel_size": 16}},
        {"parallel": {"tensor_model_parallel_size": 8}},
        "parallel.tensor_model_parallel_size",
        ["num_attention_heads=8", "try 8 or 4"],
    ),
    (
        parallelism.tensor_parallel_divides,
        "dense",
        {"parallel": {"tensor_model_parallel_size": 4}, "model": {"ffn_hidden_size": 94}},
        {"parallel": {"tensor_model_parallel_size": 2}, "model": {"ffn_hidden_size": 94}},
        "parallel.tensor_model_parallel_size",
        ["ffn_hidden_size=94", "try 2 or 1"],
    ),
    (
        parallelism.vocabulary_divides,
        "dense",
        {"parallel": TP2_SP, "model": {"padded_vocab_size": 513}},
        {"parallel": TP2_SP, "model": {"padded_vocab_size": 514}},
        "model.padded_vocab_size",
        ["multiple of tensor_model_parallel_size=2", "try 512 or 514"],
    ),
    (
        parallelism.vocabulary_divides,
        "given dense",
        {"model": {"padded_vocab_size": 500}},
        {"model": {"padded_vocab_size": 520}},
        "model.padded_vocab_size",
        ["at least the model's vocab_size=512", "try 512"],
    ),
    (
        parallelism.sequence_divides,
        "dense",
        {"parallel": TP2_SP, "data": {"packing": True, "max_length": 127}},
        {"parallel": TP2_SP, "data": {"packing": False, "max_length": 127}},
        "data.max_length",
        ["multiple of 2", "try 126 or 128"],
    ),
    (
        parallelism.sequence_divides,
        "dense",
        {"parallel": {"context_parallel_size": 2}, "data": {"seq_length": 126}},
        {"parallel": {"context_parallel_size": 2}, "data": {"seq_length": 128}},
        "data.seq_length",
        ["multiple of 4"],
    ),
    (
        parallelism.sequence_parallel_needs_tp,
        "dense",
        {"parallel": {"sequence_parallel": True}},
        {"parallel": TP2_SP},
        "parallel.sequence_parallel",
        ["tensor_model_parallel_size above 1", "try False"],
    ),
    (
        parallelism.experts_with_tp_need_sequence_parallel,
        "experts",
        {"parallel": {"tensor_model_parallel_size": 2}},
        {"parallel": TP2_SP},
        "parallel.sequence_parallel",
        ["must be true", "tensor_model_parallel_size=2"],
    ),
    (
        parallelism.experts_divide,
        "given experts",
        {"parallel": {"expert_model_parallel_size": 3}},
        {"parallel": {"expert_model_parallel_size": 4}},
        "parallel.expert_model_parallel_size",
        ["num_experts=8", "try 2 or 4"],
    ),
    (
        parallelism.experts_divide,
        "experts",
        {"parallel": {"expert_tensor_parallel_size": 5}},
        {"parallel": {"expert_tensor_parallel_size": 4}},
        "parallel.expert_tensor_parallel_size",
        ["moe_ffn_hidden_size=48", "try 4 or 6"],
    ),
    (
        parallelism.experts_divide,
        "dense",
        {"parallel": {"expert_model_parallel_size": 2}},
        {"parallel": {"expert_model_parallel_size": 1}},
        "parallel.expert_model_parallel_size",
        ["llama has none", "try 1"],
    ),
    (
        parallelism.expert_ranks_divide,
        "experts",
        {"parallel": {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 2}},
        {"parallel": {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2}},
        "parallel.expert_model_parallel_size",
        ["expert_tensor_parallel_size=2", "8 ranks", "try 4 or 2"],
    ),
    (
        parallelism.distributed_optimizer_takes_adam,
        "dense",
        {"optimizer": {"optimizer": "sgd"}},
        {"optimizer": {"optimizer": "sgd"}, "parallel": {"use_distributed_optimizer": False}},
        "optimizer.optimizer",
        ["use_distributed_optimizer=False", "Adam alone"],
    ),
    (
        parallelism.distributed_optimizer_takes_adam,
        "dense",
        {"optimizer": {"optimizer": "muon"}},
        {"optimizer": {"optimizer": "muon"}, "parallel": {"use_distributed_optimizer": False}},
        "optimizer.optimizer",
        ["'muon' needs parallel.use_distributed_optimizer=False", "try adam"],
    ),
    (
        parallelism.overlaps_have_their_needs,
        "dense",
        {"parallel": {"overlap_param_gather": True}},
        {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": True}},
        "parallel.overlap_param_gather",
        ["overlap_grad_reduce"],
    ),
    (
        parallelism.overlaps_have_their_needs,
        "dense",
        {"parallel": {"tp_comm_overlap": True, **TP2_SP}},
        {"parallel": TP2_SP},
        "parallel.tp_comm_overlap",
        ["user buffers"],
    ),
    (
        parallelism.exchange_has_its_kernels,
        "dense",
        {"parallel": {"cp_comm_type": "p2p"}, **HALF},
        {"parallel": {"cp_comm_type": "p2p", **CP2}, **HALF},
        "parallel.cp_comm_type",
        ["context_parallel_size above 1", "try None"],
    ),
    (
        parallelism.exchange_has_its_kernels,
        "dense",
        {"parallel": {"cp_comm_type": "p2p", **CP2}, "kernels": {"transformer_impl": "local"}},
        {"parallel": CP2, "kernels": {"transformer_impl": "local"}},
        "parallel.cp_comm_type",
        ["Transformer Engine's", "transformer_impl='local'", "try None"],
    ),
    (
        parallelism.exchange_has_its_kernels,
        "given dense",
        {"parallel": {"cp_comm_type": "a2a", "context_parallel_size": 4, "tensor_model_parallel_size": 2}},
        {"parallel": {"cp_comm_type": "a2a", "context_parallel_size": 2, "tensor_model_parallel_size": 2}},
        "parallel.cp_comm_type",
        ["num_query_groups=4", "cp*tp=4*2", "try p2p"],
    ),
    (
        parallelism.attention_knows_of_context,
        "dense",
        {"parallel": CP2, "kernels": {"attention_backend": "unfused"}, **HALF},
        {"parallel": CP2, "kernels": {"attention_backend": "unfused"}, "model": {"torch_dtype": "float32"}},
        "kernels.attention_backend",
        ["context_parallel_size=2", "try flash or fused"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(parallelism.RULES)


def test_dense_width_does_not_matter_where_every_layer_has_experts(judge):
    changes = {"parallel": TP2_SP, "model": {"ffn_hidden_size": 95}}
    assert judge(parallelism.tensor_parallel_divides, "experts", changes) == []
    dense_layers = {**changes, "moe": {"moe_layer_freq": 2}}
    assert len(judge(parallelism.tensor_parallel_divides, "experts", dense_layers)) == 1
