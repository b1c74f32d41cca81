"""Preference learning and distillation: settings that contradict each other or that the chosen loss does not read."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Rollout
from megabatch.config.recipe import Recipe
from megabatch.config.reference import references_named
from megabatch.config.rlhf import Dpo, Gkd, Rlhf
from megabatch.config.several_teachers import are_several, teachers_named
from megabatch.config.shared_prompts import why_not
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of the difference of scores, which an f-divergence changes; and one without a reference."""
_SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_pair", "aot_unpaired")

_OF_THE_BATCH = ("aot", "aot_pair", "aot_unpaired", "sft")


def without_reference(recipe: Recipe) -> str | None:
    """Why a recipe compares its policy with no reference; None if it does."""
    name = None if recipe.kind is None else recipe.kind.name
    if name not in ("dpo", "kto", "grpo"):
        return f"task {name!r}"
    if name == "dpo" and recipe.dpo.reference_free:
        return "reference_free=True"
    return "grpo.beta=0" if name == "grpo" and recipe.grpo.beta == 0 else None


def _is(recipe: Recipe, name: str) -> bool:
    return recipe.kind is not None and recipe.kind.name == name


def losses_and_weights_agree(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if not _is(recipe, "dpo"):
        return
    group, names = recipe.dpo, recipe.dpo.loss_types
    if not names:
        yield Fault("dpo.loss_type", group.loss_type, "names no loss", try_=("sigmoid",))
    if group.loss_weights is not None and len(group.loss_weights) != len(names):
        rule = f"must have one weight for each of the {len(names)} loss_type"
        yield Fault("dpo.loss_weights", group.loss_weights, rule)
    if group.beta == 0 and (divided := [name for name in names if name in ("ipo", "sppo_hard")]):
        yield Fault("dpo.beta", group.beta, f"must be above 0: loss_type={divided[0]!r} divides by it", try_=(0.1,))


def losses_read_their_settings(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """A setting that no loss of the recipe reads is refused, as in TRL."""
    if not _is(recipe, "dpo"):
        return
    group, names, defaults = recipe.dpo, recipe.dpo.loss_types, Dpo()
    if group.label_smoothing and not any(name in _SMOOTHED for name in names):
        rule = f"has no effect with loss_type={group.loss_type!r}; it is for {', '.join(_SMOOTHED)}"
        yield Fault("dpo.label_smoothing", group.label_smoothing, rule, try_=(0.0,))
    if not group.label_smoothing and "exo_pair" in names:
        rule = "must be above 0 with loss_type='exo_pair', which takes its logarithm"
        yield Fault("dpo.label_smoothing", group.label_smoothing, rule, try_=(1e-3,))
    whole = [name for name in names if name in _OF_THE_BATCH]
    if group.use_weighting and whole:
        rule = f"weighs pairs, and loss_type={whole[0]!r} is of the whole batch; for sft beside it give rpo_alpha"
        yield Fault("dpo.use_weighting", True, rule, try_=(False,))
    others = [name for name in names if name not in _SCORED]
    if group.f_divergence_type != defaults.f_divergence_type and others:
        rule = f"has no effect on loss_type={others[0]!r}; it is for {', '.join(_SCORED)}"
        yield Fault("dpo.f_divergence_type", group.f_divergence_type, rule, try_=(defaults.f_divergence_type,))
    for name, needed, value in (
        ("f_alpha_divergence_coef", "alpha_divergence", group.f_divergence_type),
        ("discopop_tau", "discopop", "discopop" if "discopop" in names else group.loss_type),
    ):
        if getattr(group, name) != getattr(defaults, name) and value != needed:
            yield Fault(f"dpo.{name}", getattr(group, name), f"is for {needed!r} alone, and the recipe has {value!r}")


def prompts_can_be_shared(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Where it is asked for, and not the default."""
    if recipe.rlhf.share_prompts and (reason := why_not(recipe, shape)) is not None:
        yield Fault("rlhf.share_prompts", True, f"cannot be kept: {reason}", try_=(None,))


def the_kl_has_a_use(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if _is(recipe, "kto") and recipe.kto.loss_type == "apo_zero_unpaired" and recipe.kto.calculate_KL:
        rule = "has no effect with loss_type='apo_zero_unpaired', whose loss does not contain it"
        yield Fault("kto.calculate_KL", True, rule, try_=(None,))


def a_teacher_is_named(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """A model, or a server."""
    if not _is(recipe, "gkd"):
        return
    group = recipe.gkd
    if group.teacher_model is None and group.teacher_model_server is None:
        yield Fault("gkd.teacher_model", None, "is missing: distillation needs a teacher", bare=True)
    if group.teacher_model_server is None:
        yield from _models(recipe, group.teacher_model)
        return
    yield from _server(recipe, group.teacher_model_server)


def _models(recipe: Recipe, named: str | None) -> Iterator[Fault]:
    """Teachers in the ranks."""
    group = recipe.gkd
    if named is None or not are_several(named):
        yield from _tags_are_read(recipe, several=False)
        return
    try:
        teachers_named(named, "model")
    except ValueError as e:
        yield Fault("gkd.teacher_model", named, str(e))
    for name in ("teacher_model_type", "teacher_model_revision"):
        if (value := getattr(group, name)) is not None:
            yield Fault(f"gkd.{name}", value, "is of a single teacher, and teacher_model names several", try_=(None,))
    if group.seq_kd:
        rule = "needs a single teacher, and teacher_model names several"
        yield Fault("gkd.seq_kd", True, rule, try_=(False,))


def _tags_are_read(recipe: Recipe, *, several: bool) -> Iterator[Fault]:
    key, default = recipe.gkd.teacher_tag_key, Gkd().teacher_tag_key
    if not several and key != default:
        yield Fault("gkd.teacher_tag_key", key, "has no effect: one teacher has all rows", try_=(default,))


def not_of_the_ranks(group: Gkd, address: str) -> Iterator[Fault]:
    """Settings of a teacher in the ranks, beside `teacher_model_server`."""
    for name in ("teacher_model", "teacher_model_type", "teacher_model_revision"):
        if (value := getattr(group, name)) is not None:
            rule = f"has no effect with teacher_model_server={address!r}; give one"
            yield Fault(f"gkd.{name}", value, rule, try_=(None,))
    if group.offload_teacher_model:
        rule = f"has no effect with teacher_model_server={address!r}, which has the teacher behind a server"
        yield Fault("gkd.offload_teacher_model", True, rule, try_=(False,))


def _server(recipe: Recipe, address: str) -> Iterator[Fault]:
    group = recipe.gkd
    yield from not_of_the_ranks(group, address)
    yield from _tags_are_read(recipe, several=are_several(address))
    if group.gkd_logits_topk is None:
        rule = "is missing: a server gives the log-probabilities of few tokens, never of the whole vocabulary"
        yield Fault("gkd.gkd_logits_topk", None, rule, try_=(20,), bare=True)
    if group.seq_kd:
        rule = f"needs the teacher in the ranks, and teacher_model_server={address!r} has it behind a server"
        yield Fault("gkd.seq_kd", True, rule, try_=(False,))


def a_teacher_knows_as_many(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    topk = recipe.gkd.gkd_logits_topk
    if _is(recipe, "gkd") and topk is not None and shape is not None and topk > shape.vocab_size:
        yield Fault("gkd.gkd_logits_topk", topk, f"must be at most the vocabulary of {shape.vocab_size}", try_=(64,))


_OF_WRITERS = (
    "max_completion_length", "top_p", "top_k", "repetition_penalty", "sleep_level", "vllm_mode", "offload_model",
    "offload_optimizer",
)  # fmt: skip
"""Settings of generation that distillation reads where a model writes answers."""


def answers_can_be_written(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Of distillation: answers of the student (lmbda) or the teacher (seq_kd) to the dataset's prompts."""
    if not _is(recipe, "gkd"):
        return
    group, data, rollout, defaults = recipe.gkd, recipe.data, recipe.rollout, Rollout()
    for name in ("multi_turn_scheduler", "gym_env"):
        if getattr(rollout, name) is not None:
            rule = "has no effect on distillation, whose answers have one turn"
            yield Fault(f"rollout.{name}", getattr(rollout, name), rule, try_=(None,))
    if rollout.async_generate:
        rule = "has no effect on distillation, whose answers are written with the weights of their step"
        yield Fault("rollout.async_generate", True, rule, try_=(False,))
    if group.seq_kd and group.lmbda == 1:
        yield Fault("gkd.seq_kd", True, "has no effect with lmbda=1: the student answers in every step", try_=(False,))
    if not (group.lmbda or group.seq_kd):
        for name in _OF_WRITERS:
            if (value := getattr(rollout, name)) != (default := getattr(defaults, name)):
                rule = "has no effect with gkd.lmbda=0 and seq_kd=False, which train on the dataset's answers"
                yield Fault(f"rollout.{name}", value, rule, try_=(default,))
        return
    if rollout.vllm_mode is not None and not group.lmbda:
        rule = "has no effect with gkd.lmbda=0: the teacher answers in the ranks"
        yield Fault("rollout.vllm_mode", rollout.vllm_mode, rule, try_=(None,))
    field, value = ("gkd.lmbda", group.lmbda) if group.lmbda else ("gkd.seq_kd", group.seq_kd)
    if data.streaming:
        rule = "needs the prompts of a dataset, and data.streaming=True draws rows once"
        yield Fault(field, value, rule, try_=(type(value)(0),))
    if data.pad_to_max_length:
        rule = f"has no effect with {field}={value}: how long a row is, its answers decide"
        yield Fault("data.pad_to_max_length", True, rule, try_=(False,))
    if data.loss_scale is not None and data.loss_scale.split("+")[0] != "last_round":
        rule = f"must be 'last_round' with {field}={value}: a model answers where the first learned token stands"
        yield Fault("data.loss_scale", data.loss_scale, rule, try_=("'last_round'",))


def reference_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    bridge, rlhf = recipe.bridge, recipe.rlhf
    given = {
        "bridge.ref_model": bridge.ref_model,
        "rlhf.ref_load": rlhf.ref_load,
        "bridge.ref_adapters": bridge.ref_adapters or None,
        "rlhf.ref_adapter_load": rlhf.ref_adapter_load,
    }
    given = {field: value for field, value in given.items() if value is not None}
    why = without_reference(recipe)
    for field, value in given.items():
        if why is not None:
            yield Fault(field, value, f"has no effect: {why} has no reference", try_=(None,))
    if bridge.ref_model is not None and rlhf.ref_load is not None:
        yield Fault("bridge.ref_model", bridge.ref_model, f"and ref_load={rlhf.ref_load!r} both name it; give one")
    if len(bridge.ref_adapters) > 1:
        yield Fault("bridge.ref_adapters", bridge.ref_adapters, "must be one adapter")
    if bridge.ref_adapters and rlhf.ref_adapter_load is not None:
        rule = f"and ref_adapter_load={rlhf.ref_adapter_load!r} both name the reference's adapter; give one"
        yield Fault("bridge.ref_adapters", bridge.ref_adapters, rule)


def a_reference_follows(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """`sync_ref_model` needs a reference that a blend can be written to."""
    rlhf, defaults = recipe.rlhf, Rlhf()
    if not rlhf.sync_ref_model:
        for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
            if getattr(rlhf, name) != getattr(defaults, name):
                yield Fault(f"rlhf.{name}", getattr(rlhf, name), "has no effect with sync_ref_model=False")
        return
    if (why := without_reference(recipe)) is not None:
        yield Fault("rlhf.sync_ref_model", True, f"has no effect: {why} has no reference", try_=(False,))
    elif rlhf.precompute_ref_log_probs:
        rule = "changes the reference, and precompute_ref_log_probs=True keeps its numbers from before the first step"
        yield Fault("rlhf.sync_ref_model", True, rule, try_=(False,))
    elif recipe.tuner.tuner_type == "lora":
        yield from _an_adapter_follows(recipe)


def _an_adapter_follows(recipe: Recipe) -> Iterator[Fault]:
    """With LoRA the reference is a copy of the policy's adapter, not a blend of two."""
    if recipe.rlhf.ref_model_mixup_alpha < 1:
        rule = (
            "must be 1 with LoRA, which copies the policy's adapter: a blend of two adapters' products has the sum of "
            "their ranks, and one of their matrices is another model; for others use tuner_type='full'"
        )
        yield Fault("rlhf.ref_model_mixup_alpha", recipe.rlhf.ref_model_mixup_alpha, rule, try_=(1.0,))
    for field, value in references_named(recipe).items():
        rule = "is another reference than the policy's own model, which sync_ref_model copies adapters onto"
        yield Fault(field, value, rule, try_=(None,))


def reference_is_still_there(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """What the policy begins with is the reference unless a recipe names another one."""
    if without_reference(recipe) is not None:
        return
    tuner, given = recipe.tuner, (recipe.bridge.ref_model, recipe.rlhf.ref_load, recipe.rlhf.ref_model_server)
    if any(one is not None for one in given):
        return
    if tuner.tuner_type == "lora":
        for field, trains in (
            ("modules_to_save", bool(tuner.modules_to_save)),
            ("lora_bias", tuner.lora_bias == "all"),
        ):
            if trains:
                rule = "trains the model's own parameters, without which it would be the reference; give ref_model"
                yield Fault(f"tuner.{field}", getattr(tuner, field), rule)
    elif recipe.checkpoint.load is not None and not recipe.checkpoint.finetune:
        rule = (
            "goes on with a run, whose reference is the model that it began with; give that as ref_model or ref_load, "
            "or begin with these weights, as policy and reference, with finetune=True"
        )
        yield Fault("checkpoint.load", recipe.checkpoint.load, rule)


def log_probs_can_be_precomputed(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    rlhf, field = recipe.rlhf, "rlhf.precompute_ref_log_probs"
    if rlhf.precompute_ref_batch_size is not None and not rlhf.precompute_ref_log_probs:
        rule = "has no effect without precompute_ref_log_probs=True"
        yield Fault("rlhf.precompute_ref_batch_size", rlhf.precompute_ref_batch_size, rule, try_=(None,))
    if not rlhf.precompute_ref_log_probs:
        return
    if (why := without_reference(recipe)) is not None:
        yield Fault(field, True, f"has no effect: {why} has no reference", try_=(False,))
    elif _is(recipe, "grpo"):
        yield Fault(field, True, "has no effect on grpo, whose completions do not exist yet", try_=(False,))
    elif recipe.data.streaming:
        rule = "needs all data before the first step, and data.streaming=True reads it while the run trains"
        yield Fault(field, True, rule, try_=(False,))


_OWN_LOSSES = {
    "dpo": "is one of whole answers",
    "kto": "is one of whole answers",
    "gkd": "is over the tokens already",
    "grpo": "is averaged as loss_type says",
}


def settings_of_next_token_prediction_have_a_use(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    """Settings of next-token prediction that another loss would ignore."""
    own = _OWN_LOSSES.get(recipe.kind.name) if recipe.kind is not None else None
    if recipe.kind is None or own is None:
        return
    for name in ("calculate_per_token_loss", "enable_dft_loss", "enable_channel_loss"):
        if getattr(recipe.training, name):
            rule = f"has no effect with rlhf_type={recipe.kind.name!r}, whose loss {own}"
            yield Fault(f"training.{name}", True, rule, try_=(False,))


RULES = (
    losses_and_weights_agree,
    losses_read_their_settings,
    prompts_can_be_shared,
    the_kl_has_a_use,
    a_teacher_is_named,
    a_teacher_knows_as_many,
    answers_can_be_written,
    reference_is_said_once,
    a_reference_follows,
    reference_is_still_there,
    log_probs_can_be_precomputed,
    settings_of_next_token_prediction_have_a_use,
)
