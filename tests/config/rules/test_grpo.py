"""GRPO's rules: each meets a recipe that breaks it and one that keeps it."""

from __future__ import annotations

import pytest

from megabatch.config.grpo import Grpo, Rollout
from megabatch.config.grpo_defaults import filled, needs_old, needs_old_of_first, scale_of, subtracts_kl
from megabatch.config.rules import grpo as rules


def grpo(**fields):
    return {"task": "rlhf", "rlhf": {"rlhf_type": "grpo"}, "grpo": {"reward_funcs": ("accuracy",), **fields}}


CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (rules.losses_have_what_they_read, "dense", grpo(tau_pos=2.0), grpo(tau_pos=2.0, loss_type="sapo"),
     "grpo.tau_pos", ["no effect with loss_type='grpo'", "'sapo'"]),
    (rules.losses_have_what_they_read, "dense", grpo(loss_type="dapo", fipo_clip_range=0.1),
     grpo(loss_type="fipo", fipo_clip_range=0.1), "grpo.fipo_clip_range", ["'dapo'", "'fipo'"]),
    (rules.losses_have_what_they_read, "dense", grpo(loss_type="sapo", delta=4.0), grpo(delta=4.0),
     "grpo.delta", ["does not clip the ratio on both sides"]),
    (rules.losses_have_what_they_read, "dense", grpo(loss_type="cispo"), grpo(loss_type="cispo", epsilon_high=5.0),
     "grpo.epsilon_high", ["at least 1", "try 5.0"]),
    (rules.losses_have_what_they_read, "dense",
     {**grpo(loss_type="real"), "batch": {"micro_batch_size": 12, "global_batch_size": 192}},
     {**grpo(loss_type="real"), "batch": {"micro_batch_size": 16, "global_batch_size": 1024}},
     "batch.micro_batch_size", ["multiple of num_generations=8", "try 8 or 16"]),
    (rules.losses_have_what_they_read, "dense",
     {**grpo(loss_type="real", top_entropy_quantile=0.2), "batch": {"micro_batch_size": 8}},
     {**grpo(top_entropy_quantile=0.2), "batch": {"micro_batch_size": 8}},
     "grpo.top_entropy_quantile", ["whole completions", "try 1.0"]),
    (rules.the_ratio_is_bounded_above_its_clip, "dense", grpo(epsilon_high=0.28, delta=1.25),
     grpo(epsilon_high=0.28, delta=2.0), "grpo.delta", ["above 1 + epsilon_high=1.28", "try 2.56"]),
    (rules.the_reference_is_needed, "dense", grpo(kl_in_reward=True, scale_rewards="gdpo"),
     grpo(kl_in_reward=False, scale_rewards="gdpo"), "grpo.kl_in_reward", ["gdpo", "try False"]),
    (rules.the_reference_is_needed, "dense", grpo(kl_in_reward=True, loss_type="real"),
     grpo(kl_in_reward=True, loss_type="dapo"), "grpo.kl_in_reward", ["no label", "try False"]),
    (rules.the_reference_is_needed, "dense", grpo(beta=0.0, kl_in_reward=True), grpo(kl_in_reward=True),
     "grpo.kl_in_reward", ["beta=0", "try False"]),
    (rules.a_teacher_is_heard, "dense", grpo(teacher_kl_coef=0.5),
     {**grpo(teacher_kl_coef=0.5), "gkd": {"teacher_model": "t"}}, "grpo.teacher_kl_coef", ["without a teacher"]),
    (rules.a_teacher_is_heard, "dense", {**grpo(teacher_kl_coef=0), "gkd": {"teacher_model": "t"}}, grpo(),
     "gkd.teacher_model", ["teacher_kl_coef=0", "try None"]),
    (rules.a_teacher_is_heard, "dense", {**grpo(teacher_kl_coef=0), "gkd": {"teacher_model_server": "http://h:1"}},
     {**grpo(teacher_kl_coef=0.5), "gkd": {"teacher_model_server": "http://h:1"}},
     "gkd.teacher_model_server", ["teacher_kl_coef=0", "try None"]),
    (rules.a_teacher_is_heard, "dense",
     {**grpo(), "gkd": {"teacher_model_server": "http://h:1", "teacher_model": "t"}},
     {**grpo(), "gkd": {"teacher_model_server": "http://h:1"}},
     "gkd.teacher_model", ["has no effect with teacher_model_server", "give one"]),
    (rules.a_teacher_is_heard, "dense",
     {**grpo(), "gkd": {"teacher_model_server": '[{"url": "http://h:1", "tags": ["a"]}]'}},
     {**grpo(), "gkd": {"teacher_model_server": "http://h:1,http://h:2"}},
     "gkd.teacher_model_server", ["names several", "GRPO has one"]),
    (rules.a_teacher_is_heard, "dense", {**grpo(loss_type="real"), "gkd": {"teacher_model": "t"}},
     {**grpo(), "gkd": {"teacher_model": "t"}}, "gkd.teacher_model", ["no label"]),
    (rules.a_teacher_is_heard, "dense",
     {**grpo(dynamic_sample=True, reward_funcs=()), "gkd": {"teacher_model": "t"}},
     {**grpo(reward_funcs=()), "gkd": {"teacher_model": "t"}}, "grpo.dynamic_sample", ["only a teacher"]),
    (rules.routes_can_be_replayed, "dense", grpo(router_replay_mode="R2"), grpo(),
     "grpo.router_replay_mode", ["no experts", "try disabled"]),
    (rules.routes_can_be_replayed, "experts", {**grpo(router_replay_mode="R3"), "rollout": {"vllm_mode": "server"}},
     grpo(router_replay_mode="R3"), "grpo.router_replay_mode", ["transformers inside the ranks", "try R2"]),
    (rules.routes_can_be_replayed, "experts", {**grpo(router_replay_mode="R3"), "rollout": {"gym_env": "calculator"}},
     {**grpo(router_replay_mode="R2"), "rollout": {"gym_env": "calculator"}},
     "grpo.router_replay_mode", ["experts of one turn", "try R2"]),
    (rules.routes_can_be_replayed, "experts",
     {**grpo(router_replay_mode="R2"), "moe": {"moe_expert_capacity_factor": 1.0}}, grpo(router_replay_mode="R2"),
     "grpo.router_replay_mode", ["moe_expert_capacity_factor=1", "drops"]),
    (rules.completions_decide_the_rows, "dense", {**grpo(), "data": {"packing": True}}, grpo(),
     "data.packing", ["before completions exist", "try False"]),
    (rules.completions_decide_the_rows, "dense", {**grpo(), "data": {"group_by_length": True}}, grpo(),
     "data.group_by_length", ["its completion decides", "try False"]),
    (rules.completions_decide_the_rows, "dense", {**grpo(), "data": {"loss_scale": "all"}}, grpo(),
     "data.loss_scale", ["nothing of a prompt is learned", "try None"]),
    (rules.completions_decide_the_rows, "dense", grpo(reward_funcs=()), grpo(reward_model=("judge",), reward_funcs=()),
     "grpo.reward_funcs", ["is missing"]),
    (rules.completions_decide_the_rows, "dense", grpo(reward_funcs=()),
     {**grpo(reward_funcs=()), "gkd": {"teacher_model_server": "http://h:1"}}, "grpo.reward_funcs", ["is missing"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(rules.RULES)


@pytest.mark.parametrize("rule", rules.RULES)
def test_other_runs_are_left_alone(judge, rule):
    unused = {"tau_pos": 2.0, "delta": 0.5, "loss_type": "cispo", "beta": 0.0, "kl_in_reward": True}
    assert judge(rule, "dense", {"grpo": unused, "data": {"packing": True}}) == []


@pytest.mark.parametrize(
    ("estimator", "scale", "in_reward"),
    [("grpo", "group", False), ("rloo", "none", True), ("reinforce_plus_plus", "batch", True)],
)
def test_defaults_follow_the_estimator(estimator, scale, in_reward):
    found = Grpo(advantage_estimator=estimator)
    assert (scale_of(found), subtracts_kl(found)) == (scale, in_reward)
    assert not subtracts_kl(Grpo(advantage_estimator=estimator, beta=0.0))
    assert not subtracts_kl(Grpo(advantage_estimator=estimator, scale_rewards="gdpo"))
    assert scale_of(Grpo(advantage_estimator=estimator, scale_rewards="gdpo")) == "gdpo"


def test_a_round_is_said_by_its_size_or_by_its_steps():
    by_steps, by_size = Grpo(steps_per_generation=3), Grpo(generation_batch_size=48)
    for given in (by_steps, by_size):
        found = filled(given, Rollout(), global_batch_size=16)
        assert (found.generation_batch_size, found.steps_per_generation) == (48, 3)
        assert (found.epsilon_high, found.num_generations_eval) == (0.2, 8)


@pytest.mark.parametrize(
    ("fields", "dropout", "others", "first"),
    [
        ({}, False, False, False),
        ({"num_iterations": 2}, False, False, False),
        ({"num_iterations": 2}, True, True, True),
        ({"steps_per_generation": 2}, False, True, False),
        ({"steps_per_generation": 2, "num_iterations": 2}, False, True, False),
        ({"steps_per_generation": 2}, True, True, True),
        ({}, True, False, False),
        ({"steps_per_generation": 2, "kl_in_reward": True, "beta": 0.1}, False, True, True),
        ({"steps_per_generation": 2, "log_rollout_offpolicy_metrics": True}, False, True, True),
        ({"rollout_importance_sampling_mode": "token_mask"}, False, True, True),
    ],
)
def test_which_completions_old_log_probabilities_take_a_pass_for(fields, dropout, others, first) -> None:
    found = filled(Grpo(reward_funcs=("accuracy",), **fields), Rollout(), global_batch_size=8)
    assert needs_old(found, has_dropout=dropout) is others
    assert needs_old_of_first(found, has_dropout=dropout) is first


def test_stale_completions_have_old_log_probabilities_from_a_pass() -> None:
    """Their first step is not on the policy that drew them, and is corrected for it."""
    ahead = filled(Grpo(reward_funcs=("accuracy",)), Rollout(async_generate=True), global_batch_size=8)
    assert needs_old_of_first(ahead, has_dropout=False)
