"""What the backward pass computes again."""

from __future__ import annotations

import pytest

from megabatch.config.rules import recomputation

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {**FULL, "recompute_method": "block"}
PP2 = {"pipeline_model_parallel_size": 2}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        recomputation.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_granularity": "full", "recompute_num_layers": 1}},
        {"recompute": FULL},
        "recompute.recompute_granularity",
        ["recompute_method"],
    ),
    (
        recomputation.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_granularity": "full", "recompute_method": "block"}},
        {"recompute": BLOCK},
        "recompute.recompute_granularity",
        ["recompute_num_layers=1"],
    ),
    (
        recomputation.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_method": "block"}},
        {"recompute": {"recompute_granularity": "none"}},
        "recompute.recompute_method",
        ["recompute_granularity='full'", "'selective'"],
    ),
    (
        recomputation.recompute_is_consistent,
        "dense",
        {"recompute": {**FULL, "recompute_modules": ["mlp"]}},
        {"recompute": {"recompute_modules": ["mlp"]}},
        "recompute.recompute_modules",
        ["'selective'", "'full'"],
    ),
    (
        recomputation.recompute_modules_exist,
        "dense",
        {"recompute": {"recompute_modules": ["core_attn", "moe"]}},
        {"recompute": {"recompute_modules": ["core_attn", "mlp"]}},
        "recompute.recompute_modules",
        ["'moe'", "no experts"],
    ),
    (
        recomputation.recompute_modules_exist,
        "experts",
        {"recompute": {"recompute_modules": ["moe_act"]}, "moe": {"moe_grouped_gemm": False}},
        {"recompute": {"recompute_modules": ["moe_act"]}},
        "recompute.recompute_modules",
        ["moe_grouped_gemm"],
    ),
    (
        recomputation.recompute_modules_exist,
        "dense",
        {"recompute": {"recompute_modules": ["mla_up_proj"]}},
        {"recompute": {"recompute_modules": ["mla_up_proj"]}, "mla": {"multi_latent_attention": True}},
        "recompute.recompute_modules",
        ["multi_latent_attention"],
    ),
    (
        recomputation.recompute_units_divide,
        "given dense",
        {"recompute": {**FULL, "recompute_num_layers": 4}, "parallel": PP2},
        {"recompute": {**FULL, "recompute_num_layers": 2}, "parallel": PP2},
        "recompute.recompute_num_layers",
        ["must divide the 2 layers", "try 2"],
    ),
    (
        recomputation.recompute_units_divide,
        "dense",
        {"recompute": {**BLOCK, "recompute_num_layers": 3}, "parallel": PP2},
        {"recompute": {**BLOCK, "recompute_num_layers": 3}},
        "recompute.recompute_num_layers",
        ["at most the 2 layers"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(recomputation.RULES)
