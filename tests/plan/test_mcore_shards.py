"""Parameters and bytes of each rank against what megatron-core allocates for real models, on up to 1,024 ranks."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megabatch import Batch, Data, Model, Optimizer, Parallel, Recipe, Resources, Training
from megabatch.converters.families import family_of
from megabatch.entry.estimate import settings_of
from megabatch.plan.memory import in_flight
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.rank_size import rank_sizes
from megabatch.plan.shape import ModelShape

ROOT = Path(__file__).parents[2]
DENSE, MOE = "Qwen/Qwen2.5-14B", "Qwen/Qwen3-30B-A3B"
TIED = {"untie_embeddings_and_output_weights": False}
ODD = {"hidden_size": 200, "ffn_hidden_size": 331, "num_attention_heads": 10, "num_query_groups": 2, "kv_channels": 7,
       "vocab_size": 997}  # fmt: skip


LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "num_hidden_layers": 2, "num_attention_heads": 128, "num_key_value_heads": 128,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 4096,
}  # fmt: skip
"""DeepSeek-V3's sizes, with one dense layer and one of experts."""


@dataclass(frozen=True)
class Case:
    """A layout of a published model with fewer layers, and perhaps with other sizes."""

    model: str
    layers: int
    world: int
    parallel: dict[str, Any]
    ranks: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: Any = "bfloat16"
    batch: int | None = None
    optimizer: Any = "adam"

    @property
    def shape(self) -> ModelShape:
        if self.model == "latent":
            return family_of(LATENT).shape(LATENT)
        shape = family_of(KNOWN_MODELS[self.model]).shape(KNOWN_MODELS[self.model])
        experts = (True,) * self.layers if shape.num_experts else ()
        return replace(shape, num_layers=self.layers, moe_layers=experts, **self.changes)

    @property
    def recipe(self) -> Recipe:
        parallel = Parallel(
            distributed_backend="gloo",
            sequence_parallel=self.parallel.get("tensor_model_parallel_size", 1) > 1,
            **self.parallel,
        )
        return Recipe(
            name="sizes",
            task="pt",
            model=Model(model=self.model, torch_dtype=self.dtype),
            data=Data(dataset=["nothing"], max_length=4096),
            batch=Batch(global_batch_size=self.batch or self.world),
            training=Training(train_iters=1),
            parallel=parallel,
            optimizer=Optimizer(optimizer=self.optimizer),
            resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=self.world),
        )


TP, PP, VP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
WHOLE = {"use_distributed_optimizer": False}
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
CASES = {
    "dense": Case(DENSE, 3, 8, {TP: 4}, (0, 7)),
    "groups-shared-by-no-one": Case(DENSE, 2, 8, {TP: 8}, (3,)),
    "uneven-stages": Case(DENSE, 7, 16, {TP: 2, PP: 4, FIRST: 2, LAST: 1}, (0, 4, 8, 12), batch=6),
    "tied-stages": Case(DENSE, 4, 24, {PP: 2}, (0, 12), TIED),
    "tied-chunks": Case(DENSE, 8, 12, {PP: 2, VP: 2}, (5, 11), TIED),
    "layout-string": Case(DENSE, 6, 4, {PP: 2, "pipeline_model_parallel_layout": "E|t*3|tt|tL"}, (0, 2)),
    "buckets-of-six": Case(DENSE, 9, 12, {TP: 2, "overlap_grad_reduce": True}, (0, 11)),
    "experts": Case(MOE, 2, 16, {TP: 2, EP: 8}, (0, 15)),
    "experts-split": Case(MOE, 2, 16, {EP: 8, ETP: 2}, (9,)),
    "experts-in-chunks": Case(MOE, 4, 16, {PP: 2, VP: 2, EP: 8}, (0, 8)),
    "a-thousand-ranks": Case(MOE, 16, 1024, {TP: 4, PP: 8, EP: 16}, (0, 500, 1023)),
    "latent-attention": Case("latent", 2, 64, {TP: 8, EP: 32}, (0, 63)),
    "odd-sizes": Case(DENSE, 3, 6, {TP: 1}, (0, 5), ODD),
    "odd-buckets": Case(DENSE, 3, 6, {PP: 3, "overlap_grad_reduce": True}, (0, 2, 4), ODD | TIED),
    "whole-optimizer": Case(DENSE, 2, 4, {TP: 2, "use_distributed_optimizer": False}, (0,)),
    "muon": Case(DENSE, 4, 4, WHOLE | {TP: 2, PP: 2}, (0, 2), optimizer="muon"),
    "muon-experts": Case(MOE, 2, 8, WHOLE | {TP: 2, EP: 4}, (5,), optimizer="muon"),
    "muon-float32": Case(DENSE, 3, 2, WHOLE, (0,), ODD | TIED, "float32", optimizer="muon"),
    "float32": Case(DENSE, 2, 8, {TP: 2}, (0,), ODD | {"ffn_hidden_size": 332}, "float32"),
}


@pytest.fixture(scope="module")
def allocated() -> Iterator[dict[str, list[dict[str, int]]]]:
    """What each case's ranks allocate, by one process that is each of them in turn."""
    pytest.importorskip("megatron.core")
    work = pickle.dumps([(case.recipe, case.shape, case.ranks) for case in CASES.values()])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mcore_shards.py"))],
        input=work,
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
        timeout=300,
    )
    yield dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_what_megatron_core_allocates(name: str, allocated: dict[str, list[dict[str, int]]]) -> None:
    case = CASES[name]
    settings = settings_of(case.recipe, case.shape)
    sizes = rank_sizes(case.shape, settings)
    for found in allocated[name]:
        expected = sizes[found["stage"]]
        assert found["passes"] == sum(in_flight(settings, found["stage"]))
        assert found["parameters"] == expected.parameters
        assert found["weights"] == expected.weight_bytes(settings)
        assert found["gradients"] == expected.gradient_bytes(settings)
        # the padding of a shard is not allocated: at most 64 elements of each parameter and the end of each buffer
        padding = settings.optimizer_bytes * (expected.dense + expected.experts - expected.parameters)
        assert 0 <= expected.optimizer_bytes(settings) - found["optimizer"] <= padding


def test_the_first_rank_has_a_whole_shard(allocated: dict[str, list[dict[str, int]]]) -> None:
    """Where no padding falls into it, which is so for all the sizes of published models."""
    for name in ("dense", "experts", "a-thousand-ranks", "experts-in-chunks", "whole-optimizer", "muon"):
        case, found = CASES[name], allocated[name][0]
        settings = settings_of(case.recipe, case.shape)
        assert found["optimizer"] == rank_sizes(case.shape, settings)[found["stage"]].optimizer_bytes(settings)
