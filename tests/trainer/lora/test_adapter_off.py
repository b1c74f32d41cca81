"""Adapters by name, one of them in use or none: the model without is the one that training began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapted import opened
from rank_server import RankServer
from runs import recipe, write_run

LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2_sp_ep2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}


def evaluated(run_dir: str) -> dict[str, float]:
    """The loss of the first batch: without an adapter, with the trained one, and again with a second one that adds
    nothing."""
    from megabatch.trainer.model.lora.layers import adapted_layers

    with opened(run_dir) as (_, loop, progress):
        engine, model = loop.engine, loop.engine.model
        step = next(loop.parts.steps.after(progress.cursor, engine))

        def loss() -> float:
            return engine.evaluate([step.packs], loop.parts.objective)["loss"].value

        found = {"trained": loss()}
        with model.with_adapter(None):
            found["off"] = loss()
        found["trained again"] = loss()
        for chunk in model.chunks:
            model.tuning.lora.attach(
                chunk, model.config, engine.ranks, padded_vocab=model.padded_vocab_size, name="other"
            )
        for layer in adapted_layers(model.chunks):
            for parameter in layer.lora["other"].parameters():
                parameter.data.zero_()
        model.others["other"] = model.tuning.lora
        with model.with_adapter("other"):
            found["other"] = loss()
        with model.with_adapter("default"):
            found["by name"] = loss()
        return found


def full(run_dir: str) -> float:
    with opened(run_dir, trained=False) as (_, loop, progress):
        step = next(loop.parts.steps.after(progress.cursor, loop.engine))
        return float(loop.engine.evaluate([step.packs], loop.parts.objective)["loss"].value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_without_its_adapter_is_the_base(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    groups: dict[str, Any] = {"parallel": parallel, "resources": {"tasks_per_node": world_size}}
    run = write_run(recipe(tmp_path, "qwen3_moe", tuner=LORA, **groups), tmp_path / "run")
    base = write_run(recipe(tmp_path, "qwen3_moe", **groups), tmp_path / "base")
    expected = ranks.run(full, world_size=world_size, run_dir=str(base))
    for found, plain in zip(ranks.run(evaluated, world_size=world_size, run_dir=str(run)), expected, strict=True):
        assert found["off"] == found["other"] == pytest.approx(plain, rel=1e-7)
        assert found["trained"] == found["trained again"] == found["by name"]
        assert abs(found["trained"] - plain) > 1e-3


def without(run_dir: str) -> str:
    from megabatch.errors import ConfigError

    with opened(run_dir) as (_, loop, _):
        try:
            with loop.engine.model.with_adapter(None):
                return ""
        except ConfigError as e:
            return str(e)


def test_a_model_that_is_trained_itself_has_no_reference(ranks: RankServer, tmp_path: Path) -> None:
    tuner = {**LORA, "modules_to_save": ["output_layer"]}
    run = write_run(recipe(tmp_path, "qwen3_moe", tuner=tuner), tmp_path / "run")
    (message,) = ranks.run(without, world_size=1, run_dir=str(run))
    assert message.startswith("tuner.modules_to_save and lora_bias='all' train the model's own parameters")
