"""Rules for GRPO's algorithm: settings that contradict each other, or that its other settings leave without effect."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.grpo import Grpo
from megabatch.config.grpo_defaults import scale_of
from megabatch.config.recipe import Recipe
from megabatch.config.rules.preference import not_of_the_ranks
from megabatch.config.served_models import has_teacher
from megabatch.config.several_teachers import are_several
from megabatch.errors import Fault
from megabatch.plan.batch import nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_ONLY_FOR = {
    "tau_pos": "sapo",
    "tau_neg": "sapo",
    "real_tau": "real",
    "fipo_decay_rate": "fipo",
    "fipo_clip_range": "fipo",
    "fipo_clip_high_only": "fipo",
    "fipo_safety_threshold": "fipo",
}
"""The loss that reads a parameter."""
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "fipo")
"""Losses that clip the ratio by epsilon, and that delta bounds."""


def _is_grpo(recipe: Recipe) -> bool:
    return recipe.kind is not None and recipe.kind.name == "grpo"


def losses_have_what_they_read(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Parameters of one loss need that loss; cispo's bound and real's groups must be there."""
    if not _is_grpo(recipe):
        return
    grpo, defaults = recipe.grpo, Grpo()
    for name, loss in _ONLY_FOR.items():
        if getattr(grpo, name) != getattr(defaults, name) and grpo.loss_type != loss:
            rule = f"has no effect with loss_type={grpo.loss_type!r}; it is for {loss!r}"
            yield Fault(f"grpo.{name}", getattr(grpo, name), rule)
    if grpo.delta is not None and grpo.loss_type not in _CLIPPED:
        rule = f"has no effect with loss_type={grpo.loss_type!r}, which does not clip the ratio on both sides"
        yield Fault("grpo.delta", grpo.delta, rule, try_=(None,))
    if grpo.loss_type == "cispo" and (grpo.epsilon_high is None or grpo.epsilon_high < 1):
        rule = "is cispo's upper bound of the ratio itself, and must be at least 1"
        yield Fault("grpo.epsilon_high", grpo.epsilon_high, rule, try_=(5.0,))
    if grpo.loss_type == "real":
        yield from _groups_are_whole(recipe)


def _groups_are_whole(recipe: Recipe) -> Iterator[Fault]:
    micro, group = recipe.batch.micro_batch_size, recipe.grpo.num_generations
    if micro % group:
        rule = f"must be a multiple of num_generations={group}: loss_type='real' compares the completions of a group"
        yield Fault("batch.micro_batch_size", micro, rule, try_=nearest_multiples(micro, of=group))
    if recipe.grpo.top_entropy_quantile < 1:
        rule = "has no effect with loss_type='real', whose loss is one of whole completions"
        yield Fault("grpo.top_entropy_quantile", recipe.grpo.top_entropy_quantile, rule, try_=(1.0,))


def the_ratio_is_bounded_above_its_clip(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    grpo = recipe.grpo
    high = 1 + (grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high)
    if _is_grpo(recipe) and grpo.loss_type in _CLIPPED and grpo.delta is not None and grpo.delta <= high:
        rule = f"must be above 1 + epsilon_high={high:g}: it bounds ratios that clipping leaves as they are"
        yield Fault("grpo.delta", grpo.delta, rule, try_=(2 * high,))


def the_reference_is_needed(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Settings of the KL term need one, and a use for it."""
    if not _is_grpo(recipe):
        return
    grpo = recipe.grpo
    if grpo.kl_in_reward and scale_of(grpo) == "gdpo":
        rule = "has no place with scale_rewards='gdpo', which normalises each reward by itself"
        yield Fault("grpo.kl_in_reward", True, rule, try_=(False,))
    if grpo.kl_in_reward and grpo.loss_type == "real":
        rule = "changes no label: loss_type='real' reads of an advantage only whether it is positive"
        yield Fault("grpo.kl_in_reward", True, rule, try_=(False,))
    if grpo.beta == 0 and grpo.kl_in_reward:
        yield Fault("grpo.kl_in_reward", True, "has no effect with beta=0, which needs no reference", try_=(False,))


def a_teacher_is_heard(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """A teacher's advantages need a weight and a loss that reads advantages of tokens; the weight needs a teacher."""
    if not _is_grpo(recipe):
        return
    coefficient, teacher, server = (
        recipe.grpo.teacher_kl_coef,
        recipe.gkd.teacher_model,
        recipe.gkd.teacher_model_server,
    )
    field, named = ("teacher_model", teacher) if server is None else ("teacher_model_server", server)
    if named is None:
        if coefficient != Grpo().teacher_kl_coef:
            yield Fault("grpo.teacher_kl_coef", coefficient, "has no effect without a teacher", try_=(1.0,))
        return
    if are_several(named):
        rule = "names several, which are for rlhf_type='gkd'; GRPO has one"
        yield Fault(f"gkd.{field}", named, rule)
    if server is not None:
        yield from not_of_the_ranks(recipe.gkd, server)
    if coefficient == 0:
        yield Fault(f"gkd.{field}", named, "has no effect with teacher_kl_coef=0", try_=(None,))
    if recipe.grpo.loss_type == "real":
        rule = "changes no label: loss_type='real' has one for each completion"
        yield Fault(f"gkd.{field}", named, rule, try_=(None,))
    if recipe.grpo.dynamic_sample and not _has_rewards(recipe):
        rule = "compares rewards, and only a teacher is given"
        yield Fault("grpo.dynamic_sample", True, rule, try_=(False,))


def routes_can_be_replayed(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Replay needs experts, each of whose tokens is really computed."""
    mode, field = recipe.grpo.router_replay_mode, "grpo.router_replay_mode"
    if not _is_grpo(recipe) or mode == "disabled":
        return
    if mode == "R3" and recipe.rollout.vllm_mode is not None:
        rule = (
            "needs a rollout engine that returns the experts of each token: transformers inside the ranks does, vLLM "
            "0.32 on GPUs alone, which is not wired"
        )
        yield Fault(field, mode, rule, try_=("R2",))
    if mode == "R3" and (recipe.rollout.multi_turn_scheduler or recipe.rollout.gym_env):
        rule = "replays the experts of one turn, and a conversation has several, each read again with the next"
        yield Fault(field, mode, rule, try_=("R2",))
    if shape is not None and shape.num_experts is None:
        yield Fault(field, mode, "has no effect: the model has no experts", try_=("disabled",))
    if (capacity := recipe.moe.moe_expert_capacity_factor) is not None:
        rule = (
            f"cannot be combined with moe_expert_capacity_factor={capacity:g}: which tokens an expert drops follows "
            "from probabilities as they are, not from the choices that are replayed"
        )
        yield Fault(field, mode, rule, try_=("disabled",))


def _has_rewards(recipe: Recipe) -> bool:
    return bool(recipe.grpo.reward_funcs or recipe.grpo.reward_model or recipe.rollout.use_gym_env)


def completions_decide_the_rows(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Settings of rows that are known before training, and completions are not written yet."""
    if not _is_grpo(recipe):
        return
    if recipe.data.packing:
        rule = "plans rows before completions exist; micro_batch_size completions lie in a row without padding already"
        yield Fault("data.packing", True, rule, try_=(False,))
    for name in ("pad_to_max_length", "group_by_length"):
        if getattr(recipe.data, name):
            rule = "has no effect: how long a sample is, its completion decides"
            yield Fault(f"data.{name}", True, rule, try_=(False,))
    if recipe.kind is not None and recipe.data.loss_scale not in (None, recipe.kind.loss_scale):
        rule = "has no effect: nothing of a prompt is learned"
        yield Fault("data.loss_scale", recipe.data.loss_scale, rule, try_=(None,))
    if not _has_rewards(recipe) and not has_teacher(recipe.gkd):
        yield Fault("grpo.reward_funcs", None, "is missing: name at least one reward", bare=True)


RULES = (
    losses_have_what_they_read,
    the_ratio_is_bounded_above_its_clip,
    the_reference_is_needed,
    a_teacher_is_heard,
    routes_can_be_replayed,
    completions_decide_the_rows,
)
