"""Verdicts on layouts: rules first, then nodes, then memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from megabatch import (
    Batch,
    Data,
    Gkd,
    Grpo,
    Kernels,
    Model,
    Optimizer,
    Parallel,
    Recipe,
    Resources,
    Rlhf,
    Rollout,
    Training,
    Tuner,
)
from megabatch.config.recipe import Recipe as RecipeType
from megabatch.config.rules.check import check
from megabatch.converters.families import family_of
from megabatch.entry.estimate import above, estimate_of, gpu_of, optimizer_bytes, settings_of, verdict_of
from megabatch.entry.layouts import judged_layouts, on_gpus, with_choice
from megabatch.errors import ConfigError
from megabatch.plan.gpus import GPUS
from megabatch.plan.layout import Layout, layout
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.rank_size import rank_sizes

MODEL = "Qwen/Qwen3-30B-A3B"
SHAPE = family_of(KNOWN_MODELS[MODEL]).shape(KNOWN_MODELS[MODEL])
H100 = GPUS["H100"]


def _recipe(**parallel: int | bool) -> RecipeType:
    return Recipe(
        name="moe",
        task="sft",
        model=Model(model=MODEL),
        data=Data(dataset=["data.jsonl"], max_length=4096, packing=True),
        batch=Batch(global_batch_size=32),
        training=Training(train_iters=10),
        parallel=Parallel(**parallel),  # type: ignore[arg-type]
        resources=Resources(nodes=4, gpus_per_node=8),
    )


@pytest.mark.parametrize(
    ("parallel", "reason"),
    [
        ({"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 2}, ""),
        ({"tensor_model_parallel_size": 8, "sequence_parallel": True}, " GiB > 71.2 GiB (gradients "),
        ({"expert_model_parallel_size": 16}, "ep crosses nodes of 8 GPUs"),
        ({}, " GiB > 71.2 GiB (gradients "),
    ],
)
def test_a_layout_is_kept_or_has_a_reason(parallel: dict[str, int | bool], reason: str) -> None:
    verdict = verdict_of(_recipe(**parallel), SHAPE, gpu=H100)
    assert verdict.keep == (not reason)
    assert reason in verdict.reason
    assert (verdict.estimate is None) == ("must divide" in verdict.reason)


def test_the_memory_limit_can_be_given() -> None:
    recipe = _recipe(expert_model_parallel_size=8, pipeline_model_parallel_size=2)
    needed = estimate_of(recipe, SHAPE, H100).memory.total_gib
    assert verdict_of(recipe, SHAPE, gpu=H100, gpu_memory_gib=needed + 0.1).keep
    assert not verdict_of(recipe, SHAPE, gpu=H100, gpu_memory_gib=needed - 0.1).keep


@pytest.mark.parametrize(
    ("gib", "limit", "said"),
    [
        (80.06, 71.19, "80.1 GiB > 71.2 GiB"),
        (71.2306, 71.2125, "71.23 GiB > 71.21 GiB"),
        (64.04, 64.0, "64.04 GiB > 64 GiB"),
    ],
)
def test_memory_and_its_limit_are_told_apart(gib: float, limit: float, said: str) -> None:
    assert above(gib, limit) == said


def test_a_row_of_completions_has_their_prompt_once() -> None:
    """A prompt of 4096 tokens and completions of 512: 4 in a row are 4096 + 512 tokens and 3 · 513 more."""
    recipe = replace(
        _recipe(),
        task="rlhf",
        data=Data(dataset=["data.jsonl"], max_length=4096),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=8, reward_funcs=["format"]),
        rollout=Rollout(max_completion_length=512),
        batch=Batch(micro_batch_size=4, global_batch_size=128),
        kernels=Kernels(transformer_impl="local"),
    )
    assert 4 * settings_of(recipe, SHAPE).row_tokens == pytest.approx(4096 + 512 + 3 * 513, abs=4)
    alone = replace(recipe, rlhf=replace(recipe.rlhf, share_prompts=False))
    assert settings_of(alone, SHAPE).row_tokens == 4096 + 512


@pytest.mark.parametrize("rlhf_type", ["dpo", "rm"])
def test_a_batch_of_pairs_has_both_answers(rlhf_type: Literal["dpo", "rm"]) -> None:
    """Their prompt may be one token, so that sharing it promises nothing; a pack is full either way."""
    recipe = replace(
        _recipe(),
        task="rlhf",
        rlhf=Rlhf(rlhf_type=rlhf_type),
        data=Data(dataset=["data.jsonl"], max_length=512),
        kernels=Kernels(transformer_impl="local"),
    )
    alone = replace(recipe, rlhf=replace(recipe.rlhf, share_prompts=False))
    for one in (recipe, alone):
        assert (settings_of(one, SHAPE).row_tokens, settings_of(one, SHAPE).mean_length) == (1024, 512)
    packed = replace(recipe, data=replace(recipe.data, packing=True, packing_length=4096))
    assert settings_of(packed, SHAPE).row_tokens == 4096
    single = replace(recipe, rlhf=Rlhf(rlhf_type="kto"))
    assert settings_of(single, SHAPE).row_tokens == 512, "mismatched answers take no gradients"


@pytest.mark.parametrize("gpus", [4, 16])
def test_every_kept_layout_breaks_no_rule(gpus: int) -> None:
    """The screening and the checking of what changed alone lose no fault."""
    judged = judged_layouts(_recipe(), SHAPE, gpus=gpus, gpu=H100)
    kept = [one.choice for one in judged if one.verdict.keep]
    base = on_gpus(_recipe(), gpus)
    assert kept or gpus == 4
    for choice in kept:
        assert check(with_choice(base, choice), SHAPE) == []
    for one in [one for one in judged if one.verdict.estimate is None][:: max(1, len(judged) // 50)]:
        assert one.verdict.reason in [str(fault) for fault in check(with_choice(base, one.choice), SHAPE)]


def test_a_variant_is_checked_by_what_it_changed() -> None:
    base = _recipe()
    wrong = replace(base, parallel=replace(base.parallel, expert_model_parallel_size=0))
    assert check(wrong, SHAPE, variant_of=base) == check(wrong, SHAPE) != []
    elsewhere = replace(base, tuner=Tuner(tuner_type="lora"))
    variant = replace(elsewhere, batch=Batch(global_batch_size=64))
    assert all(fault.field != "tuner.tuner_type" for fault in check(variant, SHAPE, variant_of=elsewhere))


def test_lora_is_estimated_by_its_settings() -> None:
    recipe = replace(_recipe(expert_model_parallel_size=8), tuner=Tuner(tuner_type="lora", lora_rank=16))
    full, lora = (settings_of(one, SHAPE) for one in (_recipe(expert_model_parallel_size=8), recipe))
    assert full.lora is None and lora.lora is not None and lora.lora.rank == 16
    whole, adapters = (estimate_of(one, SHAPE, H100).memory for one in (_recipe(expert_model_parallel_size=8), recipe))
    assert adapters.optimizer < whole.optimizer / 10 and adapters.weights > whole.weights


def test_second_models_weigh_what_their_layout_leaves_on_a_rank(tmp_path: Path) -> None:
    """A reference that is split alike, otherwise, or behind a server; a teacher on the ranks, offloaded or unknown."""
    parallel = {"expert_model_parallel_size": 8}
    alone = settings_of(_recipe(**parallel), SHAPE)
    dpo = replace(_recipe(**parallel), task="rlhf")
    assert settings_of(dpo, SHAPE).frozen_copies == 1
    served = settings_of(replace(dpo, rlhf=Rlhf(rlhf_type="grpo", ref_model_server="http://h:1")), SHAPE)
    assert served.frozen_copies == served.beside_bytes == 0
    split = settings_of(replace(dpo, rlhf=Rlhf(ref_tensor_model_parallel_size=4)), SHAPE)
    assert split.frozen_copies == 0
    whole = 2 * sum(size.parameters for size in rank_sizes(SHAPE, replace(alone, layout=_one_rank())))
    assert whole / 8 < split.beside_bytes < whole / 8 * 1.1, "attention over 4 ranks, experts over 8"
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[MODEL]))
    for gkd, least, most in (
        (Gkd(teacher_model=str(tmp_path), teacher_pipeline_model_parallel_size=4), whole / 32, whole / 20),
        (Gkd(teacher_model=str(tmp_path), offload_teacher_model=True), 1, whole / 90),
        (Gkd(teacher_model="nobody/knows"), 0, 0),
    ):
        taught = replace(dpo, rlhf=Rlhf(rlhf_type="gkd"), gkd=gkd)
        assert least <= settings_of(taught, SHAPE).beside_bytes <= most


def _one_rank() -> Layout:
    found = layout(world_size=1)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("optimizer", "weight_bytes", "expected"),
    [
        (Optimizer(), 2, 4 + 4 + 4),
        (Optimizer(), 4, 4 + 4),
        (Optimizer(optimizer="sgd"), 2, 4 + 4),
        (Optimizer(optimizer="sgd", sgd_momentum=0), 2, 4),
        (Optimizer(optimizer="muon"), 2, 4 + 4 + 4),  # of what AdamW updates; tests/plan/test_mcore_shards.py has all
        (Optimizer(use_precision_aware_optimizer=True), 2, 4 + 4 + 4),
        (
            Optimizer(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"),
            2,
            4 + 2 + 2,
        ),
    ],
)
def test_bytes_of_optimizer_state(optimizer: Optimizer, weight_bytes: int, expected: int) -> None:
    assert optimizer_bytes(optimizer, weight_bytes=weight_bytes) == expected


def test_a_gpu_that_is_not_known_is_named() -> None:
    assert gpu_of(None) == H100 and gpu_of("NVIDIA H200") == GPUS["H200"]
    with pytest.raises(ConfigError, match="gpu='v100' is not known; there are A100"):
        gpu_of("v100")
