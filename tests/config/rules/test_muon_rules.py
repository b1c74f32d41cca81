"""Muon's parameters, and what it does not train."""

from __future__ import annotations

import pytest

from megabatch.config.rules import muon

MUON = {"optimizer": {"optimizer": "muon"}, "parallel": {"use_distributed_optimizer": False}}


def _with(**fields):
    return {**MUON, "optimizer": {**MUON["optimizer"], **fields}}


CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        muon.muon_is_chosen,
        "dense",
        {"optimizer": {"muon_tp_mode": "blockwise"}},
        _with(muon_tp_mode="blockwise"),
        "optimizer.muon_tp_mode",
        ["needs optimizer='muon'", "try duplicated"],
    ),
    (
        muon.muon_trains_whole_matrices,
        "dense",
        {**MUON, "tuner": {"tuner_type": "lora"}},
        {"tuner": {"tuner_type": "lora"}},
        "optimizer.optimizer",
        ["LoRA trains two factors", "try adam"],
    ),
    (
        muon.rates_of_muon_fit,
        "dense",
        {**_with(muon_lr=1e-3), "learning_rate": {"lr": 1e-2, "min_lr": 2e-3}},
        {**_with(muon_lr=1e-3, muon_min_lr=1e-4), "learning_rate": {"lr": 1e-2, "min_lr": 2e-3}},
        "optimizer.muon_lr",
        ["at least 0.002"],
    ),
    (
        muon.rates_of_muon_fit,
        "dense",
        {**_with(muon_lr=1e-3), "learning_rate": {"lr": 1e-2, "lr_warmup_init": 2e-3}},
        {**_with(muon_lr=2e-3), "learning_rate": {"lr": 1e-2, "lr_warmup_init": 2e-3}},
        "optimizer.muon_lr",
        ["at least 0.002", "warmup"],
    ),
    (
        muon.rates_of_muon_fit,
        "dense",
        {**_with(muon_min_lr=1e-3), "learning_rate": {"lr": 1e-4}},
        {**_with(muon_min_lr=1e-5), "learning_rate": {"lr": 1e-4}},
        "optimizer.muon_min_lr",
        ["at most 0.0001"],
    ),
    (
        muon.rates_of_muon_fit,
        "dense",
        {**_with(muon_min_lr=2e-5), "learning_rate": {"lr": None}},
        {**_with(muon_min_lr=1e-5), "learning_rate": {"lr": None}},
        "optimizer.muon_min_lr",
        ["at most 1e-05"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(muon.RULES)


def test_every_parameter_of_muon_needs_it(judge):
    other = {
        "muon_momentum": 0.9, "muon_use_nesterov": True, "muon_lr": 0.1, "muon_min_lr": 0.01, "muon_split_qkv": False,
        "muon_scale_mode": "shape_scaling", "muon_extra_scale_factor": 0.2, "muon_num_ns_steps": 6,
        "muon_coefficient_type": "simple", "muon_fp32_matmul_prec": "high", "muon_tp_mode": "distributed",
    }  # fmt: skip
    faults = judge(muon.muon_is_chosen, "dense", {"optimizer": other})
    assert {fault.field for fault in faults} == {f"optimizer.{name}" for name in other}
