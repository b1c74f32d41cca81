"""Preference learning and distillation: settings that contradict each other or that the chosen loss does not read."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Rollout
from megabatch.config.recipe import Recipe
from megabatch.config.rlhf import Dpo
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


def the_kl_has_a_use(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if _is(recipe, "kto") and recipe.kto.loss_type == "apo_zero_unpaired" and recipe.kto.calculate_KL:
        rule = "has no effect with loss_type='apo_zero_unpaired', whose loss does not contain it"
        yield Fault("kto.calculate_KL", True, rule, try_=(None,))


def a_teacher_says_how_much(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if not _is(recipe, "gkd"):
        return
    topk, field = recipe.gkd.gkd_logits_topk, "gkd.gkd_logits_topk"
    if topk is None:
        rule = "is missing: the divergence over the whole vocabulary is not built"
        yield Fault(field, None, rule, try_=(64,), bare=True)
    elif shape is not None and topk > shape.vocab_size:
        yield Fault(field, topk, f"must be at most the vocabulary of {shape.vocab_size}", try_=(64,))


def a_temperature_has_a_use(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    value, default = recipe.rollout.temperature, Rollout().temperature
    if value != default and recipe.kind is not None and recipe.kind.name not in ("gkd", "grpo"):
        yield Fault("rollout.temperature", value, f"has no effect on {recipe.kind.name}", try_=(default,))


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


def reference_is_still_there(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """What the policy begins with is the reference unless a recipe names another one."""
    if without_reference(recipe) is not None:
        return
    tuner, named = recipe.tuner, recipe.bridge.ref_model is not None or recipe.rlhf.ref_load is not None
    if named:
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
    the_kl_has_a_use,
    a_teacher_says_how_much,
    a_temperature_has_a_use,
    reference_is_said_once,
    reference_is_still_there,
    log_probs_can_be_precomputed,
    settings_of_next_token_prediction_have_a_use,
)
