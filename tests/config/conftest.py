"""Recipes that pass every rule, and a judge that changes one and asks a rule about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings

from megabatch import Batch, Data, Model, MoE, Recipe, Resources, Training
from megabatch.config.layout import layout_of
from megabatch.config.new_model import declared_shape
from megabatch.config.rules.check import Rule
from megabatch.errors import Fault
from megabatch.plan.shape import ModelShape

settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")

Changes = Mapping[str, Any]


def _dense() -> Recipe:
    """A new model of four dense layers, on the eight GPUs of one node."""
    return Recipe(
        name="dense",
        task="sft",
        model=Model(
            model_type="llama",
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=8,
            num_query_groups=4,
            padded_vocab_size=512,
            torch_dtype="float32",
        ),
        data=Data(dataset=["train.jsonl"], max_length=128),
        batch=Batch(micro_batch_size=1, global_batch_size=16),
        training=Training(max_epochs=1),
        resources=Resources(time="1:00:00"),
    )


def _experts() -> Recipe:
    """The same with eight experts in each layer."""
    recipe = _dense()
    moe = MoE(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48)
    return replace(recipe, name="experts", model=replace(recipe.model, model_type="qwen3_moe"), moe=moe)


def _given(recipe: Recipe) -> Recipe:
    """The same shape as an existing model, so that no field of the recipe says it."""
    return replace(recipe, model=Model(model="some/model"), moe=MoE())


def _shape(recipe: Recipe) -> ModelShape:
    shape = declared_shape(recipe)
    assert shape is not None
    return shape


_BASES: dict[str, tuple[Recipe, ModelShape]] = {
    "dense": (_dense(), _shape(_dense())),
    "experts": (_experts(), _shape(_experts())),
    "given dense": (_given(_dense()), _shape(_dense())),
    "given experts": (_given(_experts()), _shape(_experts())),
}


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    """Fields of groups as `{"parallel": {"sequence_parallel": True}}`; other fields of the recipe plainly."""
    values = {
        name: replace(getattr(recipe, name), **value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return replace(recipe, **values)


@pytest.fixture
def dense() -> Recipe:
    return _dense()


@pytest.fixture
def experts() -> Recipe:
    return _experts()


@pytest.fixture
def dense_shape() -> ModelShape:
    return _shape(_dense())


@pytest.fixture
def changed() -> Callable[[Recipe, Changes], Recipe]:
    return _changed


@pytest.fixture
def judge() -> Callable[[Rule, str, Changes], list[Fault]]:
    """Faults that one rule finds in a base recipe with changes. A new model's shape follows the changes."""

    def faults(rule: Rule, base: str, changes: Changes) -> list[Fault]:
        recipe, shape = _BASES[base]
        recipe = _changed(recipe, changes)
        if recipe.model.model is None:
            made = declared_shape(recipe)
            return list(rule(recipe, made, layout_of(recipe, made)))
        return list(rule(recipe, shape, layout_of(recipe, shape)))

    return faults


@pytest.fixture
def prove(judge: Callable[[Rule, str, Changes], list[Fault]]) -> Callable[..., None]:
    """That a rule yields one fault with these words where it is broken, and none where it is kept."""

    def proven(*case: Any) -> None:
        rule, base, breaks, keeps, field, words = case
        (fault,) = judge(rule, base, breaks)
        assert fault.field == field
        assert all(word in str(fault) for word in words), str(fault)
        assert judge(rule, base, keeps) == []

    return proven
