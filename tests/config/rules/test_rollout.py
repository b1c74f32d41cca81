"""Rules for engines: each meets a recipe that breaks it and one that keeps it."""

from __future__ import annotations

import pytest

from megabatch.config.roles import Role
from megabatch.config.rules import rollout as rules

URL = "http://10.0.0.3:8000"
SERVER = {"vllm_mode": "server", "vllm_server_base_url": URL}
ROLES = (Role(name="rollout", command=["python", "-m", "megabatch.cli", "rollout", "m"]),)
CPUS = {"gpus_per_node": 0, "tasks_per_node": 8}


def rollout(**fields):
    return {"rollout": fields}


COLOCATE = {"vllm_mode": "colocate"}
SHORT = {"data": {"max_length": 40}, "model": {"max_position_embeddings": 256}}
ALONE = {"vllm_mode": "colocate", "vllm_enable_lora": True}
LORA = {"tuner": {"tuner_type": "lora"}}
GRPO = {"task": "rlhf", "rlhf": {"rlhf_type": "grpo"}, "grpo": {"reward_funcs": ("accuracy",)}}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (rules.one_engine_is_named, "dense", rollout(**SERVER, use_vllm=False), rollout(**SERVER, use_vllm=True),
     "rollout.vllm_mode", ["use_vllm=False", "try None"]),
    (rules.one_engine_is_named, "dense", rollout(use_vllm=True), rollout(use_vllm=False),
     "rollout.vllm_mode", ["must be given", "'server'"]),
    (rules.one_engine_is_named, "dense", rollout(vllm_server_port=9000), rollout(),
     "rollout.vllm_server_port", ["no effect without vllm_mode='server'"]),
    (rules.one_engine_is_named, "dense", rollout(vllm_enforce_eager=True),
     rollout(**COLOCATE, vllm_enforce_eager=True),
     "rollout.vllm_enforce_eager", ["no effect without vllm_mode='colocate'"]),
    (rules.one_engine_is_named, "dense", rollout(**SERVER, vllm_max_num_seqs=4),
     rollout(**COLOCATE, vllm_max_num_seqs=4),
     "rollout.vllm_max_num_seqs", ["without vllm_mode='colocate'", "a flag of their own, see `megabatch rollout`"]),
    (rules.one_engine_is_named, "dense", rollout(**COLOCATE, vllm_server_host="n1"), rollout(**COLOCATE),
     "rollout.vllm_server_host", ["without vllm_mode='server'"]),
    (rules.servers_can_be_found, "dense", rollout(vllm_mode="server"),
     {**rollout(vllm_mode="server"), "roles": ROLES}, "rollout.vllm_mode", ["exactly one of", "given are 0"]),
    (rules.servers_can_be_found, "dense", rollout(**SERVER, vllm_server_host="n1"), rollout(**SERVER),
     "rollout.vllm_mode", ["given are 2"]),
    *[(rules.servers_can_be_found, "dense", rollout(vllm_mode="server", vllm_server_base_url=url), rollout(**SERVER),
       "rollout.vllm_server_base_url", [said]) for url, said in [
        ("10.0.0.3:8000", "must be http://host:port; try 'http://localhost:8000'"),
        ("localhost", "must be http://host:port"), ("ftp://n1:8000", "must be http://host:port"),
        ("http://n1:port", "must be http://host:port (Port could not be cast"), ("http://n1:99999", "0-65535"),
        (f"{URL},", "must be http://host:port"), (f"{URL}, http:// n1:80", "must be http://host:port"),
        (f"{URL}, http://n1:8000, {URL}/", f"names {URL} twice"),
    ]],
    *[(rules.servers_can_be_found, "dense", rollout(vllm_mode="server", vllm_server_host=host),
       rollout(vllm_mode="server", vllm_server_host="n1, n2"), "rollout.vllm_server_host", [said]) for host, said in [
        ("http://n1", "must be a host alone; vllm_server_base_url takes http://host:port; try 'localhost'"),
        ("n1:8000", "must be a host alone"), ("n1,", "must be http://host:port"), ("n1, n1", "names n1 twice"),
    ]],
    (rules.generating_ahead_is_possible, "dense", rollout(async_generate=True), rollout(**SERVER, async_generate=True),
     "rollout.async_generate", ["needs vllm_mode='server'", "transformers runs inside the ranks", "try False"]),
    (rules.generating_ahead_is_possible, "dense", rollout(vllm_mode="colocate", async_generate=True), rollout(),
     "rollout.async_generate", ["needs vllm_mode='server'", "colocated vLLM runs inside the ranks"]),
    (rules.generating_ahead_is_possible, "dense", rollout(**SERVER, max_staleness=2),
     rollout(**SERVER, max_staleness=2, async_generate=True), "rollout.max_staleness", ["without async_generate"]),
    (rules.generating_ahead_is_possible, "dense", rollout(**SERVER, async_generate=True, sleep_level=1),
     rollout(**SERVER, sleep_level=1), "rollout.sleep_level", ["generates then", "try 0"]),
    (rules.generating_ahead_is_possible, "dense",
     {**rollout(**SERVER, async_generate=True), "grpo": {"loss_type": "real"}},
     {**rollout(**SERVER, async_generate=True), "grpo": {"loss_type": "grpo"}},
     "grpo.loss_type", ["no importance ratio", "stale completions"]),
    (rules.the_trainer_makes_room, "dense", rollout(**SERVER, offload_model=True), rollout(offload_model=True),
     "rollout.offload_model", ["do not share the trainer's devices", "try False"]),
    (rules.vllm_computes_these_heads, "dense", {**rollout(**SERVER), "model": {"kv_channels": 12}},
     {**rollout(**SERVER), "model": {"kv_channels": 16}}, "model.kv_channels", ["try 8 or 16"]),
    (rules.vllm_computes_these_heads, "dense",
     {**rollout(**SERVER), "model": {"kv_channels": 16}, "resources": CPUS},
     {**rollout(**SERVER), "model": {"kv_channels": 32}, "resources": CPUS}, "model.kv_channels", ["try 32 or 64"]),
    (rules.vllm_computes_these_heads, "dense", {**rollout(**COLOCATE), "model": {"kv_channels": 12}},
     {**rollout(**COLOCATE), "model": {"kv_channels": 16}}, "model.kv_channels", ["try 8 or 16"]),
    (rules.vllm_computes_these_heads, "dense",
     {**rollout(**SERVER), "model": {"model_type": "qwen2", "kv_channels": 16}},
     {**rollout(**SERVER), "model": {"model_type": "qwen2", "kv_channels": 8}},
     "model.kv_channels", ["gives qwen2 no other", "try 8"]),
    (rules.engines_divide_the_ranks, "dense", rollout(**COLOCATE, vllm_tensor_parallel_size=3),
     rollout(**COLOCATE, vllm_tensor_parallel_size=2), "rollout.vllm_tensor_parallel_size",
     ["must divide 8, the run's ranks", "try 2 or 4"]),
    (rules.engines_divide_the_ranks, "dense",
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=4), "resources": {**CPUS, "tasks_per_node": 2, "nodes": 4}},
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=2), "resources": {**CPUS, "tasks_per_node": 2, "nodes": 4}},
     "rollout.vllm_tensor_parallel_size", ["must divide 2, a node's ranks", "without GPUs no engine spans nodes"]),
    (rules.engines_divide_the_ranks, "dense",
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=8), "model": {"num_attention_heads": 4, "num_query_groups": 2}},
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=4), "model": {"num_attention_heads": 4, "num_query_groups": 2}},
     "rollout.vllm_tensor_parallel_size", ["must divide model.num_attention_heads=4", "try 2 or 4"]),
    (rules.engines_divide_the_ranks, "dense",
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=4), "model": {"num_attention_heads": 12, "num_query_groups": 6}},
     {**rollout(**COLOCATE, vllm_tensor_parallel_size=2), "model": {"num_attention_heads": 12, "num_query_groups": 6}},
     "rollout.vllm_tensor_parallel_size", ["must divide model.num_query_groups=6, or be a multiple", "try 2 or 3"]),
    (rules.engines_take_whole_completions, "dense",
     {**GRPO, **rollout(**COLOCATE, vllm_max_model_len=55, max_completion_length=16), **SHORT},
     {**GRPO, **rollout(**COLOCATE, vllm_max_model_len=56, max_completion_length=16), **SHORT},
     "rollout.vllm_max_model_len", ["at least 56", "data.max_length and rollout.max_completion_length", "try 56"]),
    (rules.engines_take_whole_completions, "dense", rollout(**COLOCATE, vllm_max_model_len=10**7), rollout(**COLOCATE),
     "rollout.vllm_max_model_len", ["is above model.max_position_embeddings="]),
    (rules.engine_kwargs_are_vllms_own, "dense", rollout(**COLOCATE, vllm_engine_kwargs={"max_num_seqs": 4}),
     rollout(**COLOCATE, vllm_engine_kwargs={"max_num_batched_tokens": 4}),
     "rollout.vllm_engine_kwargs['max_num_seqs']", ["is set by rollout.vllm_max_num_seqs"]),
    (rules.engine_kwargs_are_vllms_own, "dense", rollout(**COLOCATE, vllm_engine_kwargs={"load_format": "auto"}),
     rollout(**COLOCATE), "rollout.vllm_engine_kwargs['load_format']", ["follows from the run and cannot be set"]),
    (rules.adapters_fit_the_engine, "dense", {**LORA, **rollout(vllm_enable_lora=True)}, {**LORA, **rollout(**ALONE)},
     "rollout.vllm_enable_lora", ["needs vLLM", "try False"]),
    (rules.adapters_fit_the_engine, "dense", rollout(**ALONE), rollout(**COLOCATE),
     "rollout.vllm_enable_lora", ["needs tuner.tuner_type='lora', not 'full'"]),
    (rules.adapters_fit_the_engine, "experts", {**LORA, **rollout(**ALONE)}, {**LORA, **rollout(**COLOCATE)},
     "rollout.vllm_enable_lora", ["not for mixtures of experts", "by Triton alone", "merged weights", "try False"]),
    (rules.adapters_fit_the_engine, "dense",
     {"tuner": {"tuner_type": "lora", "modules_to_save": ("lm_head",)}, **rollout(**ALONE)},
     {**LORA, **rollout(**ALONE)}, "tuner.modules_to_save", ["does not send"]),
    (rules.adapters_fit_the_engine, "dense",
     {"tuner": {"tuner_type": "lora", "target_modules": ("all-linear", "all-embedding")}, **rollout(**ALONE)},
     {**LORA, **rollout(**ALONE)}, "tuner.target_modules", ["['all-embedding']", "vLLM does not adapt"]),
    (rules.adapters_fit_the_engine, "dense", {"tuner": {"tuner_type": "lora", "lora_rank": 600}, **rollout(**ALONE)},
     {**LORA, **rollout(**ALONE)}, "tuner.lora_rank", ["is above 512", "try 512"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(rules.RULES)
