"""How many completions passes for log-probabilities take at a time by default."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch import (
    Batch,
    Data,
    Gkd,
    Grpo,
    Kernels,
    Model,
    MoE,
    Parallel,
    Recipe,
    Recompute,
    Resources,
    Rlhf,
    Rollout,
    Tuner,
)
from megabatch.config.flags import Actions
from megabatch.config.run import RunConfig
from megabatch.config.shared_prompts import inferred_answers_in_a_row, shares_prompts, why_local_layers
from megabatch.converters.families import family_of
from megabatch.entry.estimate import estimate_of, gpu_of
from megabatch.entry.infer_batch import default_infer_batch_size, with_infer_batch_size
from megabatch.entry.launch import Launch, prepare, written
from megabatch.entry.plan_text import plan_text
from megabatch.errors import ConfigError
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape

DENSE, EXPERTS = "Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B"
LOCAL: dict[str, Any] = {"kernels": Kernels(transformer_impl="local")}
FULL: dict[str, Any] = {
    "recompute": Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
}
ADAPTER: dict[str, Any] = {"tuner": Tuner(tuner_type="lora", lora_dropout=0.0)}


def _shape(model: str) -> ModelShape:
    return family_of(KNOWN_MODELS[model]).shape(KNOWN_MODELS[model])


def _recipe(
    model: str = DENSE, *, micro: int = 2, total: int = 128, tp: int = 2, pp: int = 1, ep: int = 1,
    grpo: dict[str, Any] | None = None, **groups: Any,
) -> Recipe:  # fmt: skip
    made = Recipe(
        name="one",
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        model=Model(model=model),
        data=Data(dataset=["data.jsonl"], max_length=512),
        grpo=Grpo(reward_funcs=["accuracy"], **(grpo or {})),
        rollout=Rollout(max_completion_length=512),
        batch=Batch(micro_batch_size=micro, global_batch_size=total),
        parallel=Parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            sequence_parallel=tp > 1,
        ),
        resources=Resources(nodes=1, gpus_per_node=8),
    )
    return replace(made, **groups)


def _peak(recipe: Recipe, shape: ModelShape, size: int) -> list[int]:
    """Bytes of each stage where passes take so many completions at a time."""
    sized = replace(recipe, grpo=replace(recipe.grpo, infer_batch_size=size), rlhf=Rlhf(rlhf_type="grpo"))
    shared = replace(sized, rlhf=replace(sized.rlhf, share_prompts=shares_prompts(recipe, shape)))
    return [stage.total for stage in estimate_of(shared, shape, gpu_of("H100")).stages]


@pytest.mark.parametrize(
    ("recipe", "size", "next_size"),
    [
        (_recipe(**LOCAL), 16, None),
        (_recipe(), 16, None),
        (_recipe(grpo={"num_generations": 64}, total=512, **LOCAL), 32, 64),
        (_recipe(**FULL), 4, 8),
        (_recipe(micro=1, **FULL, **LOCAL), 2, 4),
        (_recipe(total=32, **LOCAL), 8, None),  # a rank has no more
        (_recipe(EXPERTS, tp=1, ep=8), 16, None),
    ],
    ids=["shared", "alone", "large groups", "recomputed", "recomputed by one", "small rounds", "experts"],
)
def test_the_default_leaves_the_peak_of_memory_as_it_is(recipe: Recipe, size: int, next_size: int | None) -> None:
    """By the plan's whole estimate of each stage; the next size of whole or equally cut prompts would raise it."""
    shape = _shape(str(recipe.model.model))
    assert default_infer_batch_size(recipe, shape) == size
    least = _peak(recipe, shape, 1)
    assert _peak(recipe, shape, size) == least
    assert next_size is None or max(_peak(recipe, shape, next_size)) > max(least)


@pytest.mark.parametrize(("prompt", "size"), [(1024, 8), (256, 4)])
def test_fewer_micro_batches_wait_longer_in_a_pipeline(prompt: int, size: int) -> None:
    """A rank has 32 completions, of 512 tokens. In parts of these, with two stages: prompts of 1024 tokens take
    (2/8 + 1) (1 + 1/4) = 1.56 with 8 at a time, 1.69 with 4, and 1.88 with 16; those of 256 take 1.33, 1.27 and 1.59.
    """
    data = Data(dataset=["data.jsonl"], max_length=prompt)
    assert default_infer_batch_size(_recipe(tp=1, pp=2, data=data, **LOCAL), _shape(DENSE)) == size


def test_without_shared_prompts_a_pipeline_keeps_its_micro_batches() -> None:
    assert default_infer_batch_size(_recipe(tp=1, pp=2), _shape(DENSE)) == 2


@pytest.mark.parametrize(
    "recipe",
    [
        _recipe(data=Data(dataset=["data.jsonl"], max_length=512, padding_free=False)),
        _recipe(EXPERTS, tp=1, ep=8, moe=MoE(moe_expert_capacity_factor=2.0)),
    ],
    ids=["padding", "capacity"],
)
def test_where_completions_depend_on_those_beside_them_passes_are_as_training(recipe: Recipe) -> None:
    assert default_infer_batch_size(recipe, _shape(str(recipe.model.model))) == 2


@pytest.mark.parametrize(
    "recipe", [_recipe(grpo={"infer_batch_size": 3}), _recipe(grpo={"beta": 0.0}), _recipe(rlhf=Rlhf())]
)
def test_nothing_is_chosen_where_it_is_given_or_has_no_use(recipe: Recipe) -> None:
    assert default_infer_batch_size(recipe, _shape(DENSE)) is None


def test_the_default_changes_no_layers() -> None:
    """Single completions of a micro-batch share nothing, and get Transformer Engine's layers; where these are local
    anyway, passes share prompts and steps do not."""
    shape = _shape(DENSE)
    for recipe, shares in ((_recipe(micro=1, **ADAPTER), False), (_recipe(micro=1, **LOCAL), True)):
        assert not shares_prompts(recipe, shape)
        sized = with_infer_batch_size(recipe, shape, 16)
        assert shares_prompts(sized, shape) is shares and inferred_answers_in_a_row(sized) == 8
        assert (why_local_layers(sized, shape) is None) == (why_local_layers(recipe, shape) is None)


def test_a_larger_teacher_takes_fewer_at_a_time(tmp_path: Path) -> None:
    shape = _shape(DENSE)
    recipe = _recipe(grpo={"beta": 0.0}, **LOCAL)
    found = {}
    for name, factor in (("equal", 1), ("large", 4)):
        config = dict(KNOWN_MODELS[DENSE])
        config |= {key: factor * int(config[key]) for key in ("hidden_size", "intermediate_size")}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found[name] = default_infer_batch_size(replace(recipe, gkd=Gkd(teacher_model=str(tmp_path / name))), shape)
    assert found == {"equal": 16, "large": 8}
    assert default_infer_batch_size(replace(recipe, gkd=Gkd(teacher_model="nobody/knows")), shape) == 2


@pytest.fixture
def generating(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    config = Path(str(recipe.model.model)) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 8}))
    return replace(
        recipe,
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(reward_funcs=["format"], num_generations=4),
        rollout=Rollout(max_completion_length=8),
        data=replace(recipe.data, max_length=8),
        batch=Batch(micro_batch_size=1, global_batch_size=16),
    )


def _launch(recipe: Recipe) -> Launch:
    return prepare(recipe, Actions(local=True, run_dir="here"), recipe_file=Path(__file__))


def test_the_size_is_in_run_json_and_in_the_plan(generating: Recipe) -> None:
    launch = _launch(generating)
    chosen = launch.config(provenance={})
    size = chosen.recipe.grpo.infer_batch_size
    assert size == default_infer_batch_size(generating, chosen.shape) and size is not None and size > 1
    assert json.loads(launch.run_json(provenance={}))["recipe"]["grpo"]["infer_batch_size"] == size
    assert f"; log-probabilities of {size} completions at a time" in plan_text(launch, refusals=[])
    alone = replace(generating, grpo=replace(generating.grpo, beta=0.0))
    assert "log-probabilities" not in plan_text(_launch(alone), refusals=[])


@pytest.mark.parametrize("earlier", [None, 3])
def test_a_run_goes_on_with_the_size_that_it_began_with(earlier: int | None, generating: Recipe) -> None:
    """Also one that had none: it goes on with micro-batches as in training."""
    with written(_launch(generating), []) as directory:
        run = RunConfig.load(directory.run_json)
    before = replace(run.recipe.grpo, infer_batch_size=earlier)
    shared = replace(run.recipe.rlhf, share_prompts=False)
    replace(run, recipe=replace(run.recipe, grpo=before, rlhf=shared)).save(directory.run_json)
    with written(_launch(generating), []):
        assert RunConfig.load(directory.run_json).recipe.grpo.infer_batch_size == earlier
    other = replace(generating, grpo=replace(generating.grpo, infer_batch_size=2))
    with pytest.raises(ConfigError, match=r"grpo\.infer_batch_size"), written(_launch(other), []):
        pass
