"""Faults of what is trained that need the model's tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Bridge, Data, Model, Recipe, Tuner
from megabatch.config.new_model import declared_shape
from megabatch.entry.tuning import tuning_faults

MODEL = Model(
    model_type="qwen2",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    padded_vocab_size=256,
    untie_embeddings_and_output_weights=False,
)
RECIPE = Recipe(name="r", task="sft", model=MODEL, data=Data(dataset=["d.jsonl"]))


def faults(*targets: str, merge_lora: bool | None) -> list[str]:
    tuner = Tuner(tuner_type="lora", target_modules=targets)
    recipe = replace(RECIPE, tuner=tuner, bridge=Bridge(merge_lora=merge_lora))
    return [str(fault) for fault in tuning_faults(recipe, declared_shape(recipe))]


@pytest.mark.parametrize("merge_lora", [None, True])
def test_an_adapter_of_a_tied_embedding_is_not_merged(merge_lora: bool | None) -> None:
    (fault,) = faults("all-linear", "embed_tokens", merge_lora=merge_lora)
    assert fault.startswith(
        f"bridge.merge_lora={merge_lora} would merge the embedding's adapter into the output layer"
    )
    assert fault.endswith("which unties the two; try False")
    assert not faults("all-linear", "embed_tokens", merge_lora=False) + faults("all-linear", merge_lora=merge_lora)


def test_of_several_adapters_in_a_folder_one_must_be_named(tmp_path: Path) -> None:
    for name in ("first", "second"):  # as peft saves all but the one called default
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    recipe = replace(RECIPE, tuner=Tuner(tuner_type="lora"), bridge=Bridge(adapters=[str(tmp_path)]))
    (fault,) = [str(fault) for fault in tuning_faults(recipe, declared_shape(recipe))]
    assert (
        fault.startswith("bridge.adapters")
        and "holds adapters in folders of their own; name one: first, second" in fault
    )
