"""Preference learning: what contradicts itself, or would be ignored, is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Bridge, Checkpoint, Data, Dpo, Gkd, Grpo, Kto, Rlhf, Rollout, Training, Tuner
from megabatch.config.rules.check import check
from megabatch.config.run import RunConfig, resolve

LORA = Tuner(tuner_type="lora", lora_rank=4)
TWO_MODELS = '[{"model": "t", "tags": ["a"]}, {"model": "u", "tags": ["b"]}]'
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no loss": ({"dpo": Dpo(loss_type=[])}, "dpo.loss_type=() names no loss; try sigmoid"),
    "weights": (
        {"dpo": Dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0])},
        "dpo.loss_weights=(1.0,) must have one weight for each of the 2 loss_type",
    ),
    "beta": ({"dpo": Dpo(loss_type="ipo", beta=0)}, "dpo.beta=0 must be above 0: loss_type='ipo' divides by it"),
    "smoothing": (
        {"dpo": Dpo(loss_type="hinge", label_smoothing=0.1)},
        "dpo.label_smoothing=0.1 has no effect with loss_type='hinge'",
    ),
    "exo": ({"dpo": Dpo(loss_type="exo_pair")}, "dpo.label_smoothing=0.0 must be above 0 with loss_type='exo_pair'"),
    "divergence": (
        {"dpo": Dpo(loss_type=["sigmoid", "nca_pair"], f_divergence_type="forward_kl")},
        "dpo.f_divergence_type='forward_kl' has no effect on loss_type='nca_pair'",
    ),
    "alpha": (
        {"dpo": Dpo(f_alpha_divergence_coef=0.7)},
        "dpo.f_alpha_divergence_coef=0.7 is for 'alpha_divergence' alone, and the recipe has 'reverse_kl'",
    ),
    "tau": ({"dpo": Dpo(discopop_tau=1.0)}, "dpo.discopop_tau=1.0 is for 'discopop' alone, and the"),
    "free": (
        {"dpo": Dpo(reference_free=True), "bridge": Bridge(ref_model="m")},
        "bridge.ref_model='m' has no effect: reference_free=True has no reference",
    ),
    "two models": (
        {"bridge": Bridge(ref_model="m"), "rlhf": Rlhf(ref_load="l")},
        "bridge.ref_model='m' and ref_load='l' both name it",
    ),
    "two adapters": ({"bridge": Bridge(ref_adapters=["a", "b"])}, "must be one adapter"),
    "adapters of both kinds": (
        {"bridge": Bridge(ref_adapters=["a"]), "rlhf": Rlhf(ref_adapter_load="l")},
        "both name the reference's adapter",
    ),
    "trained base": (
        {"tuner": replace(LORA, modules_to_save=["output_layer"])},
        "tuner.modules_to_save=('output_layer',) trains the model's own parameters",
    ),
    "another run's reference": ({"checkpoint": Checkpoint(load="run")}, "checkpoint.load='run' goes on with a run"),
    "no teacher": ({"rlhf": Rlhf(rlhf_type="gkd")}, "gkd.teacher_model is missing: distillation needs a teacher"),
    "a teacher and a server": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model="t", teacher_model_server="http://h:1", gkd_logits_topk=4),
        },
        "gkd.teacher_model='t' has no effect with teacher_model_server='http://h:1'",
    ),
    "a server without a number": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model_server="http://h:1")},
        "gkd.gkd_logits_topk is missing: a server gives the log-probabilities of few tokens",
    ),
    "one tag twice": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(
                teacher_model_server='[{"url": "http://h:1", "tags": ["a"]}, {"url": "role:r", "tags": ["b", "a"]}]',
                gkd_logits_topk=4,
            ),
        },
        "gives the tag 'a' to two teachers",
    ),
    "no such role among several": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(
                teacher_model_server='[{"url": "http://h:1", "tags": ["a"]}, {"url": "role:r", "tags": ["b"]}]',
                gkd_logits_topk=4,
            ),
        },
        "gkd.teacher_model_server='role:r' names no role of the recipe, which has none",
    ),
    "a teacher without tags": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model_server='[{"url": "http://h:1"}]', gkd_logits_topk=4),
        },
        'must have entries of the form {"url": "http://host:port", "tags": ["name", …]}, and has {"url": "http://h:1"}',
    ),
    "a tag of one teacher": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model_server="http://h:1", gkd_logits_topk=4, teacher_tag_key="source"),
        },
        "gkd.teacher_tag_key='source' has no effect: one teacher has all rows",
    ),
    "a tag of one model": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model="t", teacher_tag_key="source")},
        "gkd.teacher_tag_key='source' has no effect: one teacher has all rows",
    ),
    "models without tags": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model='[{"model": "t"}]')},
        'must have entries of the form {"model": "folder or hub name", "tags": ["name", …]}, and has {"model": "t"}',
    ),
    "a revision of several": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model=TWO_MODELS, teacher_model_revision="main")},
        "gkd.teacher_model_revision='main' is of a single teacher, and teacher_model names several",
    ),
    "several that write": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model=TWO_MODELS, seq_kd=True)},
        "gkd.seq_kd=True needs a single teacher, and teacher_model names several",
    ),
    "no such role": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model_server="role:big", gkd_logits_topk=4)},
        "gkd.teacher_model_server='role:big' names no role of the recipe, which has none",
    ),
    "a server that writes": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model_server="http://h:1", gkd_logits_topk=4, seq_kd=True)},
        "gkd.seq_kd=True needs the teacher in the ranks",
    ),
    "a server's key": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model="t", teacher_api_key_variable="KEY")},
        "gkd.teacher_api_key_variable='KEY' has no effect without teacher_model_server",
    ),
    "a teacher that would never answer": (
        {"rlhf": Rlhf(rlhf_type="gkd"), "gkd": Gkd(teacher_model="t", lmbda=1.0, seq_kd=True)},
        "gkd.seq_kd=True has no effect with lmbda=1",
    ),
    "settings of a writer": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model="t", lmbda=0.0),
            "rollout": Rollout(max_completion_length=9),
        },
        "rollout.max_completion_length=9 has no effect with gkd.lmbda=0 and seq_kd=False",
    ),
    "answers to a stream": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model="t"),
            "data": Data(dataset=["d.jsonl"], streaming=True),
        },
        "gkd.lmbda=0.5 needs the prompts of a dataset, and data.streaming=True draws rows once",
    ),
    "answers in every turn": (
        {
            "rlhf": Rlhf(rlhf_type="gkd"),
            "gkd": Gkd(teacher_model="t", lmbda=0.0, seq_kd=True),
            "data": Data(dataset=["d.jsonl"], loss_scale="all"),
        },
        "data.loss_scale='all' must be 'last_round' with gkd.seq_kd=True",
    ),
    "no reference to follow": (
        {"rlhf": Rlhf(rlhf_type="grpo", sync_ref_model=True), "grpo": Grpo(beta=0.0, reward_funcs=["accuracy"])},
        "rlhf.sync_ref_model=True has no effect: grpo.beta=0 has no reference",
    ),
    "a stored reference that follows": (
        {"rlhf": Rlhf(sync_ref_model=True, precompute_ref_log_probs=True)},
        "rlhf.sync_ref_model=True changes the reference, and precompute_ref_log_probs=True keeps its numbers",
    ),
    "a blend of adapters": (
        {"rlhf": Rlhf(sync_ref_model=True), "tuner": LORA},
        "rlhf.ref_model_mixup_alpha=0.6 must be 1 with LoRA, which copies the policy's adapter",
    ),
    "an adapter of another model": (
        {"rlhf": Rlhf(sync_ref_model=True, ref_model_mixup_alpha=1.0), "tuner": LORA, "bridge": Bridge(ref_model="m")},
        "bridge.ref_model='m' is another reference than the policy's own model",
    ),
    "steps between no blends": (
        {"rlhf": Rlhf(ref_model_sync_steps=8)},
        "rlhf.ref_model_sync_steps=8 has no effect with sync_ref_model=False",
    ),
    "kl": (
        {"rlhf": Rlhf(rlhf_type="kto"), "kto": Kto(loss_type="apo_zero_unpaired", calculate_KL=True)},
        "kto.calculate_KL=True has no effect with loss_type='apo_zero_unpaired'",
    ),
    "free and precomputed": (
        {"dpo": Dpo(reference_free=True), "rlhf": Rlhf(precompute_ref_log_probs=True)},
        "rlhf.precompute_ref_log_probs=True has no effect: reference_free=True has no reference",
    ),
    "reward model": (
        {"rlhf": Rlhf(rlhf_type="rm", precompute_ref_log_probs=True)},
        "rlhf.precompute_ref_log_probs=True has no effect: task 'rm' has no reference",
    ),
    "stream": (
        {"data": Data(dataset=["d.jsonl"], streaming=True), "rlhf": Rlhf(precompute_ref_log_probs=True)},
        "rlhf.precompute_ref_log_probs=True needs all data before the first step",
    ),
    "weighted batch": (
        {"dpo": Dpo(loss_type=["sigmoid", "sft"], use_weighting=True)},
        "dpo.use_weighting=True weighs pairs, and loss_type='sft' is of the whole batch",
    ),
    "size of nothing": (
        {"rlhf": Rlhf(precompute_ref_batch_size=4)},
        "rlhf.precompute_ref_batch_size=4 has no effect without precompute_ref_log_probs=True",
    ),
    "prompts of others": (
        {"rlhf": Rlhf(rlhf_type="kto", share_prompts=True)},
        "rlhf.share_prompts=True cannot be kept: it is for dpo, rm, reranker, grpo",
    ),
    "temperature": ({"rollout": Rollout(temperature=0.5)}, "rollout.temperature=0.5 has no effect on dpo"),
    "tokens": (
        {"training": Training(train_iters=1, calculate_per_token_loss=True)},
        "training.calculate_per_token_loss=True has no effect with rlhf_type='dpo'",
    ),
}  # fmt: skip


def test_prompts_are_not_shared_by_transformer_engines_layers(dense) -> None:
    half = replace(dense.model, torch_dtype="bfloat16")
    found = check(replace(dense, task="rlhf", model=half, rlhf=Rlhf(share_prompts=True)))
    reason = "rlhf.share_prompts=True cannot be kept: transformer_impl='transformer_engine' has no attention"
    assert any(str(fault).startswith(reason) for fault in found)


@pytest.mark.parametrize("name", FAULTS)
def test_faults(dense, name: str) -> None:
    changed, message = FAULTS[name]
    assert any(message in str(fault) for fault in check(replace(dense, task="rlhf", **changed))), message


def test_a_reference_needs_a_task_that_compares(dense) -> None:
    faults = map(str, check(replace(dense, bridge=Bridge(ref_model="m"))))
    assert any("bridge.ref_model='m' has no effect: task 'sft' has no reference" in fault for fault in faults)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dpo": Dpo(loss_type=["sigmoid", "aot_pair"], loss_weights=[1, 0.5], label_smoothing=0.1, rpo_alpha=1)},
        {"dpo": Dpo(loss_type="discopop", discopop_tau=0.1, f_divergence_type="alpha_divergence")},
        {"tuner": LORA, "bridge": Bridge(ref_adapters=["a"])},
        {"rlhf": Rlhf(rlhf_type="kto", precompute_ref_log_probs=True, precompute_ref_batch_size=4)},
        {"checkpoint": Checkpoint(load="run", finetune=True)},
        {"checkpoint": Checkpoint(load="run"), "rlhf": Rlhf(ref_load="sft")},
    ],
)
def test_what_is_allowed(dense, changed: dict[str, Any]) -> None:
    assert check(replace(dense, task="rlhf", **changed)) == []


def test_losses_survive_run_json(dense, tmp_path) -> None:
    for losses in ("ipo", ("sigmoid", "sft")):
        made = replace(dense, task="rlhf", dpo=Dpo(loss_type=losses))  # type: ignore[arg-type]
        from megabatch.config.new_model import declared_shape

        run = resolve(made, shape=declared_shape(made), run_dir=tmp_path, provenance={})  # type: ignore[arg-type]
        run.save(tmp_path / "run.json")
        assert RunConfig.load(tmp_path / "run.json").recipe.dpo.loss_type == losses
        assert run.recipe.dpo.loss_types == ((losses,) if isinstance(losses, str) else losses)
