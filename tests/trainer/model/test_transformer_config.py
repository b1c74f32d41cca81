"""What the trainer sets itself is refused among `megatron_extra_kwargs` before a run is queued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from runs import recipe, write_run

from megabatch.config.rules import extra_kwargs
from megabatch.config.run import RunConfig
from megabatch.trainer.model import transformer_config as module
from megabatch.trainer.model.transformer_config import own_values, trains_biases_alone_of, transformer_config

GROUPS: list[dict[str, dict[str, Any]]] = [
    {"recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    {
        "parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "resources": {"tasks_per_node": 2},
    },
]


def _run(folder: Path, **groups: dict[str, Any]) -> RunConfig:
    return RunConfig.load(write_run(recipe(folder, **groups), folder / "run") / "run.json")


@pytest.mark.parametrize("groups", GROUPS)
def test_every_field_that_the_trainer_sets_has_an_owner(groups: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    run = _run(tmp_path, **groups)
    values = own_values(run.recipe, run.shape, virtual_size=2)
    assert [name for name in values if extra_kwargs.owner_of(name) is None] == []


def test_every_owned_field_is_one_of_megatron_core() -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert known >= {*extra_kwargs._UNDER_OTHER_NAMES, *extra_kwargs._OF_THE_MODEL, *extra_kwargs._OF_THE_TRAINER}


def test_what_nobody_sets_reaches_megatron_core(tmp_path: Path) -> None:
    run = _run(tmp_path, training={"megatron_extra_kwargs": {"barrier_with_L1_time": False}})
    assert transformer_config(run.recipe, run.shape, virtual_size=None).barrier_with_L1_time is False


@pytest.mark.parametrize(
    ("tuner", "needed"),
    [
        ({}, False),
        ({"freeze_parameters": ("embedding.", "decoder.layers.0.")}, False),
        ({"freeze_parameters_regex": r"linear_qkv\."}, False),
        ({"freeze_parameters_regex": r"linear_qkv\.bias"}, False),
        ({"freeze_parameters_regex": r"linear_qkv\.weight"}, True),
        ({"freeze_parameters": ("model.",), "trainable_parameters_regex": r"self_attn\..*bias$"}, True),
        ({"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": r"\.bias$"}, True),
    ],
)
def test_biases_beside_frozen_weights_need_local_layers(tuner: dict[str, Any], needed: bool, tmp_path: Path) -> None:
    """Transformer Engine's layers give them no gradient."""
    run = RunConfig.load(write_run(recipe(tmp_path, "qwen2", tuner=tuner), tmp_path / "run") / "run.json")
    assert trains_biases_alone_of(run.recipe.tuner, run.shape) == needed


@pytest.mark.parametrize(
    ("installed", "has_te", "used"),
    [((), True, "fused"), (("flash_attn",), True, "flash"), (("flash_attn_3",), True, "flash"), ((), False, "flash")],
)
def test_transformer_engine_has_attention_without_flash_attn(
    installed: tuple[str, ...], has_te: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert module._attention_backend("flash", has_te=has_te) is AttnBackend[used]
    assert module._attention_backend("unfused", has_te=has_te) is AttnBackend.unfused
