"""Models behind servers: each rule meets a recipe that breaks it and one that keeps it."""

from __future__ import annotations

from typing import Any

import pytest

from megabatch.config.roles import Role
from megabatch.config.rules import served_models as rules

ROLES = [Role(name=name, command=["python", "serve.py"]) for name in ("rollout", "reference")]
ONE = "http://h:1"


def grpo(rlhf: dict[str, Any], **groups: Any) -> dict[str, Any]:
    return {
        "task": "rlhf",
        "rlhf": {"rlhf_type": "grpo", **rlhf},
        "grpo": {"reward_funcs": ("accuracy",)},
        "roles": ROLES,
        **groups,
    }


def served(**rlhf: Any) -> dict[str, Any]:
    return grpo({"ref_model_server": ONE, **rlhf})


GENERATES = {"rollout": {"vllm_mode": "server"}}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (rules.servers_can_be_asked, "dense", served(ref_model_server="node7:8000"),
     served(ref_model_server="http://node7:8000, https://node8:8000/v1"),
     "rlhf.ref_model_server", ["'node7:8000'", "must be http://host:port, or role:NAME"]),
    (rules.servers_can_be_asked, "dense", served(ref_model_server="role:referee"),
     served(ref_model_server="role:reference"),
     "rlhf.ref_model_server", ["names no role", "which has rollout, reference", "try role:rollout or role:reference"]),
    (rules.servers_can_be_asked, "dense", {**served(ref_model_server="role:rollout"), **GENERATES},
     {**served(ref_model_server="role:reference"), **GENERATES},
     "rlhf.ref_model_server", ["servers get the policy's weights", "give the reference its own"]),
    (rules.servers_can_be_asked, "dense", served(ref_model_server="role:reference", ref_api_key_variable="KEY"),
     served(ref_api_key_variable="KEY"), "rlhf.ref_api_key_variable", ["has the job's own token", "try None"]),
    (rules.servers_can_be_asked, "dense", grpo({"ref_server_timeout": 9.0}), served(ref_server_timeout=9.0),
     "rlhf.ref_server_timeout", ["has no effect without ref_model_server", "try 240"]),
    (rules.servers_can_be_asked, "dense", grpo({}, gkd={"teacher_server_timeout": 9.0}),
     grpo({}, gkd={"teacher_server_timeout": 9.0, "teacher_model_server": ONE}),
     "gkd.teacher_server_timeout", ["has no effect without teacher_model_server"]),
    (rules.servers_can_be_asked, "dense", grpo({}, gkd={"teacher_model_server": "role:rollout"}, **GENERATES),
     grpo({}, gkd={"teacher_model_server": "role:reference"}, **GENERATES),
     "gkd.teacher_model_server", ["give the teacher its own"]),
    (rules.a_served_reference_is_the_only_one, "dense", {**served(), "grpo": {"beta": 0.0}}, served(),
     "rlhf.ref_model_server", ["grpo.beta=0 has no reference", "try None"]),
    (rules.a_served_reference_is_the_only_one, "dense", {**served(), "rlhf": {"ref_model_server": ONE}}, served(),
     "rlhf.ref_model_server", ["is for rlhf_type='grpo'; dpo has its reference in the ranks"]),
    (rules.a_served_reference_is_the_only_one, "dense", {**served(), "bridge": {"ref_model": "m"}}, served(),
     "bridge.ref_model", ["has no effect with ref_model_server", "give one"]),
    (rules.a_served_reference_is_the_only_one, "dense", served(ref_load="folder"), served(),
     "rlhf.ref_load", ["has no effect with ref_model_server"]),
    (rules.a_served_reference_is_the_only_one, "dense", {**served(), "bridge": {"ref_adapters": ("a",)}}, served(),
     "bridge.ref_adapters", ["has no effect with ref_model_server"]),
    (rules.a_served_reference_is_the_only_one, "dense", served(sync_ref_model=True), served(),
     "rlhf.sync_ref_model", ["cannot change the model behind", "try False"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_rule(prove: Any, case: Any) -> None:
    prove(*case)


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(rules.RULES)
