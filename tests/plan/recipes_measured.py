"""Runs that others have published memory and time of, as recipes.

The figures are those of Megatron-SWIFT's documentation. Its command lines say what the pages leave open: "8xA800, 8K"
is its base-to-chat example (tensor parallel 4, 16 rows of 8,192 packed tokens, selective recomputation), "16xA800, 8K"
its best practice for Qwen3-30B-A3B (tensor parallel 2, expert parallel 8, 16 rows, full recomputation).
Both other recipes name no GPU: A800 is assumed. Rows are assumed to be full, and packed rows to hold one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabatch import Batch, Data, Model, MoE, Parallel, Recipe, Recompute, Resources, Training, Tuner
from megabatch.converters.families import family_of
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape

_FULL = Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
_QWEN3_MOE = "Qwen/Qwen3-30B-A3B-Instruct-2507"


@dataclass(frozen=True)
class Measured:
    """A recipe and what it took."""

    recipe: Recipe
    gib: float
    seconds: float | None

    @property
    def shape(self) -> ModelShape:
        config = KNOWN_MODELS[self.recipe.model.model or ""]
        return family_of(config).shape(config)


def _recipe(model: str, **groups: object) -> Recipe:
    given = {"data": Data(dataset=["data.jsonl"], max_length=8192, packing=True), **groups}
    return Recipe(name="measured", task="sft", model=Model(model=model), training=Training(train_iters=1), **given)  # type: ignore[arg-type]


MEASURED = {
    "Qwen2.5-14B, 8 GPUs": Measured(
        _recipe(
            "Qwen/Qwen2.5-14B",
            batch=Batch(micro_batch_size=1, global_batch_size=16),
            parallel=Parallel(tensor_model_parallel_size=4, sequence_parallel=True),
            resources=Resources(nodes=1, gpus_per_node=8),
        ),
        gib=64,
        seconds=9.04,
    ),
    "Qwen3-30B-A3B, 16 GPUs": Measured(
        _recipe(
            "Qwen/Qwen3-30B-A3B",
            batch=Batch(micro_batch_size=1, global_batch_size=16),
            parallel=Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=8, sequence_parallel=True),
            recompute=_FULL,
            resources=Resources(nodes=2, gpus_per_node=8),
        ),
        gib=60,
        seconds=9.6,
    ),
    "Qwen3-30B-A3B, 8 GPUs": Measured(
        _recipe(
            _QWEN3_MOE,
            batch=Batch(micro_batch_size=1, global_batch_size=4),
            parallel=Parallel(
                tensor_model_parallel_size=4,
                pipeline_model_parallel_size=2,
                decoder_first_pipeline_num_layers=25,
                expert_model_parallel_size=4,
                sequence_parallel=True,
            ),
            moe=MoE(moe_permute_fusion=True, moe_expert_capacity_factor=2),
            recompute=_FULL,
            resources=Resources(nodes=1, gpus_per_node=8),
        ),
        gib=76,
        seconds=3,
    ),
    "Qwen3-30B-A3B, LoRA on 2 GPUs": Measured(
        _recipe(
            _QWEN3_MOE,
            data=Data(dataset=["data.jsonl"], max_length=2048),
            batch=Batch(micro_batch_size=8, global_batch_size=16),
            parallel=Parallel(expert_model_parallel_size=2),
            moe=MoE(moe_permute_fusion=True, moe_expert_capacity_factor=2),
            recompute=_FULL,
            tuner=Tuner(tuner_type="lora", lora_rank=8),
            resources=Resources(nodes=1, gpus_per_node=2),
        ),
        gib=50,
        seconds=None,
    ),
}
