"""Activations of a layer against what autograd saves in the trainer's own layers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megabatch import Batch, Data, Kernels, Model, Parallel, Recipe, Recompute, Resources, Training, Tuner
from megabatch.converters.families import family_of
from megabatch.entry.estimate import settings_of
from megabatch.plan.activations import layer_activations
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape

TUNERS = {
    "full": Tuner(),
    "LoRA": Tuner(tuner_type="lora", lora_rank=16, lora_dropout=0.0),
    "LoRA on attention": Tuner(tuner_type="lora", target_modules=["linear_qkv", "linear_proj"], lora_dropout=0.0),
}
ROOT = Path(__file__).parents[2]
LENGTH = 512
MODELS = {
    "Qwen/Qwen2.5-14B": {},
    "Qwen/Qwen3-8B": {},
    "Qwen/Qwen3-30B-A3B": {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128},
}


def _shape(name: str, layers: int) -> ModelShape:
    shape = family_of(KNOWN_MODELS[name]).shape(KNOWN_MODELS[name])
    sizes = {"hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8, "num_query_groups": 2}
    experts = (True,) * layers if shape.num_experts else ()
    return replace(
        shape, num_layers=layers, kv_channels=32, vocab_size=256, moe_layers=experts, **sizes, **MODELS[name]
    )


def _recipe(name: str, tuner: str) -> Recipe:
    return Recipe(
        name="saved",
        task="pt",
        model=Model(model=name, torch_dtype="bfloat16"),
        data=Data(dataset=["nothing"], max_length=LENGTH, packing=True),
        batch=Batch(global_batch_size=1),
        training=Training(train_iters=1),
        kernels=Kernels(transformer_impl="local"),
        parallel=Parallel(distributed_backend="gloo"),
        recompute=Recompute(recompute_granularity="none"),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=1),
        tuner=TUNERS[tuner],
    )


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], tuple[int, int]]:
    """bf16 bytes that one layer of each model keeps, and bytes that live at once in two of them without gradients."""
    pytest.importorskip("megatron.core")
    cases = list(product(MODELS, TUNERS))
    work = [(_recipe(name, tuner), _shape(name, layers)) for name, tuner in cases for layers in (1, 2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mcore_saved.py"))],
        input=pickle.dumps(work),
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        case: (found[2 * i + 1]["half"] - found[2 * i]["half"], found[2 * i + 1]["passing"])
        for i, case in enumerate(cases)
    }


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_keeps_what_is_counted(name: str, tuner: str, kept: dict[tuple[str, str], tuple[int, int]]) -> None:
    shape = _shape(name, 1)
    settings = settings_of(_recipe(name, tuner), shape)
    counted = layer_activations(shape, settings, (bool(shape.num_experts), False)).whole
    assert counted == pytest.approx(kept[name, tuner][0], rel=0.05)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_without_gradients_holds_no_more_than_is_counted(
    name: str, tuner: str, kept: dict[tuple[str, str], tuple[int, int]]
) -> None:
    """With the fp32 copies of the CPU's norms, and embedding and logits of 256 tokens."""
    shape = _shape(name, 1)
    settings = settings_of(_recipe(name, tuner), shape)
    counted = layer_activations(shape, settings, (bool(shape.num_experts), False)).passing
    assert counted / 2 < kept[name, tuner][1] < counted
