"""A teacher or a reference with a layout of its own that does not fit is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Bridge, Data, Gkd, Grpo, MoE, Parallel, Recipe, Rlhf, Tuner
from megabatch.config.rules.check import check
from megabatch.config.rules.second_layouts import model_divides
from megabatch.config.second_layouts import TEACHER, layout_of, parallel_of, row_units
from megabatch.plan.shape import ModelShape

GKD, LORA = {"rlhf_type": "gkd"}, Tuner(tuner_type="lora")


@pytest.fixture
def eight(dense: Recipe) -> Recipe:
    return replace(dense, task="rlhf")


def beside(**sizes: Any) -> Gkd:
    return Gkd(teacher_model="t", **{f"teacher_{name}_parallel_size": value for name, value in sizes.items()})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": (
        {"rlhf": Rlhf(), "gkd": Gkd(teacher_tensor_model_parallel_size=2)},
        "gkd.teacher_tensor_model_parallel_size=2 has no effect: the recipe has no teacher_model",
    ),
    "a server": (
        {
            "rlhf": Rlhf(**GKD),
            "gkd": Gkd(
                teacher_model_server="http://h:1", gkd_logits_topk=4, lmbda=0.0, teacher_tensor_model_parallel_size=2
            ),
        },
        "has no effect: the teacher is behind teacher_model_server",
    ),
    "a reference's server": (
        {
            "rlhf": Rlhf(rlhf_type="grpo", ref_model_server="http://h:1", ref_tensor_model_parallel_size=2),
            "grpo": Grpo(reward_funcs=("accuracy",)),
        },
        "rlhf.ref_tensor_model_parallel_size=2 has no effect: the reference is behind ref_model_server",
    ),
    "ranks": (
        {"rlhf": Rlhf(**GKD), "gkd": beside(tensor_model=3)},
        "gkd.teacher_tensor_model_parallel_size=3 must divide the 8 ranks: tp*pp*cp=3*1*1 of this model does not; "
        "try 2 or 4",
    ),
    "the run's stages": (
        {"rlhf": Rlhf(**GKD), "gkd": beside(tensor_model=4), "parallel": Parallel(pipeline_model_parallel_size=4)},
        "gkd.teacher_tensor_model_parallel_size=4 must divide the 8 ranks: tp*pp*cp=4*4*1 of this model does not; "
        "try 2 or 1",
    ),
    "heads": (
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=16)},
        "rlhf.ref_tensor_model_parallel_size=16 must divide the model's num_attention_heads=8; try 8 or 4",
    ),
    "layers": (
        {"rlhf": Rlhf(ref_pipeline_model_parallel_size=8)},
        "rlhf.ref_pipeline_model_parallel_size=8 must divide the model's num_layers=4, which are spread evenly",
    ),
    "the policy": (
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=2), "tuner": LORA},
        "has no effect: the reference is the policy, with another adapter or none",
    ),
    "no reference": (
        {"rlhf": Rlhf(rlhf_type="rm", ref_tensor_model_parallel_size=2)},
        "rlhf.ref_tensor_model_parallel_size=2 has no effect: task 'rm' has no reference",
    ),
    "it follows": (
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=2, sync_ref_model=True)},
        "rlhf.ref_tensor_model_parallel_size=2 needs the policy's layout with sync_ref_model=True",
    ),
    "rows": (
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=4), "data": Data(dataset=["d"], packing=True, max_length=1026)},
        "data.max_length=1026 must be a multiple of 4, the parts a sequence is cut into by tp and cp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, eight: Recipe, dense_shape: ModelShape) -> None:
    changes, expected = REFUSED[name]
    found = [str(fault) for fault in check(replace(eight, **changes), dense_shape)]
    assert any(expected in fault for fault in found), found


def test_accepted(eight: Recipe, dense_shape: ModelShape) -> None:
    for changes in (
        {"rlhf": Rlhf(**GKD), "gkd": beside(tensor_model=2, pipeline_model=2)},
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=2, ref_context_parallel_size=2)},
        {"rlhf": Rlhf(ref_tensor_model_parallel_size=2), "bridge": Bridge(ref_model="m"), "tuner": LORA},
    ):
        assert check(replace(eight, **changes), dense_shape) == []  # type: ignore[arg-type]


def test_experts_of_a_teacher(eight: Recipe, dense_shape: ModelShape) -> None:
    experts = replace(
        dense_shape,
        num_experts=8,
        moe_ffn_hidden_size=64,
        moe_layers=(True,) * dense_shape.num_layers,
        moe_router_topk=2,
    )
    recipe = replace(eight, rlhf=Rlhf(**GKD), gkd=beside(expert_model=3, tensor_model=2))
    found = [str(fault) for fault in model_divides(recipe, TEACHER, experts)]
    assert found[0] == "gkd.teacher_expert_model_parallel_size=3 must divide the model's num_experts=8; try 2 or 4"
    recipe = replace(eight, gkd=beside(expert_model=4), moe=MoE(moe_token_dispatcher_type="allgather"))
    found = [str(fault) for fault in model_divides(recipe, TEACHER, experts)]
    assert "needs moe_token_dispatcher_type='alltoall' without" in found[0]
    recipe = replace(eight, gkd=beside(expert_model=4), moe=MoE(moe_token_dispatcher_type="flex"))
    (found,) = [str(fault) for fault in model_divides(recipe, TEACHER, experts)]
    assert "needs moe_token_dispatcher_type='alltoall' for a model with experts: DeepEP's" in found


def test_a_size_of_the_run_that_the_teacher_does_not_take(eight: Recipe, dense_shape: ModelShape) -> None:
    recipe = replace(eight, rlhf=Rlhf(**GKD), gkd=beside(), parallel=Parallel(tensor_model_parallel_size=4))
    found = [str(fault) for fault in model_divides(recipe, TEACHER, replace(dense_shape, num_attention_heads=6))]
    assert found[0] == (
        "parallel.tensor_model_parallel_size=4 is the teacher's too, and must divide the model's "
        "num_attention_heads=6; or give teacher_tensor_model_parallel_size"
    )


def test_sizes_that_are_not_given_are_the_runs(eight: Recipe) -> None:
    recipe = replace(eight, parallel=Parallel(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2))
    recipe = replace(recipe, gkd=beside(tensor_model=2))
    parallel = parallel_of(recipe, TEACHER)
    layout = layout_of(recipe, parallel)
    assert layout is not None and (layout.tp, layout.pp, layout.vp, layout.dp) == (2, 2, 1, 2)
    assert parallel.sequence_parallel and parallel.num_virtual_stages_per_pipeline_rank is None
    assert row_units(recipe) == (1, 2)
    assert row_units(replace(recipe, gkd=beside(context=2), rlhf=Rlhf(ref_tensor_model_parallel_size=3))) == (4, 12)
