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


CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (rules.one_engine_is_named, "dense", rollout(**SERVER, use_vllm=False), rollout(**SERVER, use_vllm=True),
     "rollout.vllm_mode", ["use_vllm=False", "try None"]),
    (rules.one_engine_is_named, "dense", rollout(use_vllm=True), rollout(use_vllm=False),
     "rollout.vllm_mode", ["must be given", "'server'"]),
    (rules.one_engine_is_named, "dense", rollout(vllm_server_port=9000), rollout(),
     "rollout.vllm_server_port", ["no effect without vllm_mode='server'"]),
    (rules.servers_can_be_found, "dense", rollout(vllm_mode="server"),
     {**rollout(vllm_mode="server"), "roles": ROLES}, "rollout.vllm_mode", ["exactly one of", "given are 0"]),
    (rules.servers_can_be_found, "dense", rollout(**SERVER, vllm_server_host="n1"), rollout(**SERVER),
     "rollout.vllm_mode", ["given are 2"]),
    (rules.generating_ahead_is_possible, "dense", rollout(async_generate=True), rollout(**SERVER, async_generate=True),
     "rollout.async_generate", ["needs vllm_mode='server'", "transformers runs inside the ranks", "try False"]),
    (rules.generating_ahead_is_possible, "dense", rollout(vllm_mode="colocate", async_generate=True), rollout(),
     "rollout.async_generate", ["needs vllm_mode='server'", "colocated vLLM runs inside the ranks"]),
    (rules.generating_ahead_is_possible, "dense", rollout(**SERVER, max_staleness=2),
     rollout(**SERVER, max_staleness=2, async_generate=True), "rollout.max_staleness", ["without async_generate"]),
    (rules.generating_ahead_is_possible, "dense", rollout(**SERVER, async_generate=True, sleep_level=1),
     rollout(**SERVER, sleep_level=1), "rollout.sleep_level", ["generates then", "try 0"]),
    (rules.generating_ahead_is_possible, "dense", rollout(**SERVER, async_generate=True, multi_turn_scheduler="x"),
     rollout(**SERVER, multi_turn_scheduler="x"), "rollout.multi_turn_scheduler", ["they train then", "try None"]),
    (rules.generating_ahead_is_possible, "dense",
     {**rollout(**SERVER, async_generate=True), "grpo": {"loss_type": "real"}},
     {**rollout(**SERVER, async_generate=True), "grpo": {"loss_type": "grpo"}},
     "grpo.loss_type", ["no importance ratio", "stale completions"]),
    (rules.vllm_computes_these_heads, "dense", {**rollout(**SERVER), "model": {"kv_channels": 12}},
     {**rollout(**SERVER), "model": {"kv_channels": 16}}, "model.kv_channels", ["try 8 or 16"]),
    (rules.vllm_computes_these_heads, "dense",
     {**rollout(**SERVER), "model": {"kv_channels": 16}, "resources": CPUS},
     {**rollout(**SERVER), "model": {"kv_channels": 32}, "resources": CPUS}, "model.kv_channels", ["try 32 or 64"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(rules.RULES)
