"""Batch formulas: each rule meets a recipe that breaks it and one that keeps it."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product

import pytest

from megabatch.config.rules import batches

TP2 = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}


def grpo(**fields):
    return {"task": "rlhf", "rlhf": {"rlhf_type": "grpo"}, "grpo": fields}


CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        batches.world_holds_whole_replicas,
        "dense",
        {"parallel": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4}},
        {"parallel": {"tensor_model_parallel_size": 4}},
        "resources.nodes",
        ["world size 1*8=8", "tp*pp*cp=4*4*1=16", "try 2"],
    ),
    (
        batches.world_holds_whole_replicas,
        "dense",
        {"resources": {"nodes": 3}, "parallel": {"tensor_model_parallel_size": 16}},
        {"resources": {"nodes": 2}, "parallel": {"tensor_model_parallel_size": 16}},
        "resources.nodes",
        ["try 2 or 4"],
    ),
    (
        batches.global_batch_is_whole,
        "dense",
        {"batch": {"global_batch_size": 10}},
        {"batch": {"global_batch_size": 24}},
        "batch.global_batch_size",
        ["micro_batch_size*dp=1*8=8", "try 8 or 16"],
    ),
    (
        batches.interleaving_has_enough_microbatches,
        "dense",
        {"parallel": PIPELINE, "batch": {"global_batch_size": 12}},
        {"parallel": PIPELINE, "batch": {"global_batch_size": 8}},
        "batch.global_batch_size",
        ["3 micro-batches", "pp=2", "try 8 or 16"],
    ),
    (
        batches.interleaving_has_enough_microbatches,
        "dense",
        {"parallel": {**PIPELINE, "microbatch_group_size_per_virtual_pipeline_stage": 8}},
        {"parallel": {**PIPELINE, "microbatch_group_size_per_virtual_pipeline_stage": 4}},
        "parallel.microbatch_group_size_per_virtual_pipeline_stage",
        ["from pp=2", "micro-batches=4"],
    ),
    (
        batches.grpo_step_has_whole_prompts,
        "dense",
        {**grpo(num_generations=8), "batch": {"global_batch_size": 96}},
        {**grpo(num_generations=8), "batch": {"global_batch_size": 64}},
        "batch.global_batch_size",
        ["96/8/8 = 3/2 prompts", "multiple of micro_batch_size=1", "try 64 or 128"],
    ),
    (
        batches.grpo_step_has_whole_prompts,
        "dense",
        {**grpo(num_generations=4), "batch": {"global_batch_size": 32, "micro_batch_size": 2}},
        {**grpo(num_generations=4), "batch": {"global_batch_size": 64, "micro_batch_size": 2}},
        "batch.global_batch_size",
        ["micro_batch_size=2", "try 64"],
    ),
    (
        batches.grpo_round_has_whole_steps,
        "dense",
        grpo(num_generations=2, generation_batch_size=40),
        grpo(num_generations=2, generation_batch_size=48),
        "grpo.generation_batch_size",
        ["multiple of global_batch_size=16", "try 32 or 48"],
    ),
    (
        batches.grpo_round_has_whole_steps,
        "dense",
        grpo(num_generations=2, generation_batch_size=48, steps_per_generation=2),
        grpo(num_generations=2, generation_batch_size=48, steps_per_generation=3),
        "grpo.generation_batch_size",
        ["16*2=32", "try 32"],
    ),
    (
        batches.grpo_round_has_whole_prompts,
        "dense",
        grpo(num_generations=8, steps_per_generation=2),
        grpo(num_generations=8, steps_per_generation=4),
        "grpo.steps_per_generation",
        ["16*2=32", "num_generations*dp=8*8=64", "try 4"],
    ),
    (
        batches.grpo_round_has_whole_prompts,
        "dense",
        grpo(num_generations=8, generation_batch_size=80),
        grpo(num_generations=8, generation_batch_size=128),
        "grpo.generation_batch_size",
        ["num_generations*dp=8*8=64", "try 64 or 128"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(batches.RULES)


@pytest.mark.parametrize("rule", batches.RULES)
def test_grpo_rules_leave_other_runs_alone(judge, rule):
    if rule.__name__.startswith("grpo"):
        assert judge(rule, "dense", {"grpo": {"num_generations": 7, "generation_batch_size": 5}}) == []


@pytest.mark.parametrize(("total", "generations", "micro"), list(product((8, 48, 96), (2, 3, 8), (1, 2))))
def test_suggested_global_batch_passes_the_rule_it_came_from(judge, total, generations, micro):
    def changes(size):
        return {
            **grpo(num_generations=generations),
            "batch": {"global_batch_size": size, "micro_batch_size": micro},
            "parallel": TP2,
        }

    for fault in judge(batches.grpo_step_has_whole_prompts, "dense", changes(total)):
        for size in fault.try_:
            assert judge(batches.grpo_step_has_whole_prompts, "dense", changes(size)) == []
            assert (Fraction(size, generations * 4) / micro).denominator == 1


def test_every_number_that_a_fault_names_is_accepted_in_its_place(judge):
    """Whatever else is wrong: with it no rule of batches refuses the same field again."""

    def faults(changes):
        return [fault for rule in batches.RULES for fault in judge(rule, "dense", changes)]

    rng, tried = random.Random(0), 0
    for _ in range(100):
        pp = rng.choice((1, 2, 4))
        changes = {
            **grpo(
                num_generations=rng.choice((1, 2, 3, 4, 6, 8)),
                steps_per_generation=rng.choice((1, 1, 2, 3, 5)),
                generation_batch_size=rng.choice((None, rng.randint(1, 200))),
            ),
            "batch": {"global_batch_size": rng.randint(1, 96), "micro_batch_size": rng.choice((1, 2, 3, 4))},
            "parallel": PIPELINE | {"pipeline_model_parallel_size": pp} if pp > 1 else {},
        }
        for fault in faults(changes):
            group, name = fault.field.split(".")
            for value in fault.try_:
                mended = {**changes, group: {**changes[group], name: value}}
                assert fault.field not in {one.field for one in faults(mended)}, (changes, str(fault), value)
                tried += 1
    assert tried > 150


def test_a_round_of_any_size_is_looked_through(judge):
    changes = grpo(num_generations=3, generation_batch_size=10**15) | {"batch": {"global_batch_size": 7}}
    (fault,) = judge(batches.grpo_step_has_whole_prompts, "dense", changes)
    assert fault.field == "batch.global_batch_size" and fault.try_
