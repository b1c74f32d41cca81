"""Rules for the task, and for what its objective reads."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.config.rlhf import Rlhf
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.tasks import TASKS, find_task


def task_and_algorithm_agree(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    task, algorithm, task_type = recipe.kind, recipe.rlhf.rlhf_type, recipe.training.task_type
    if recipe.task != "rlhf" and algorithm != Rlhf().rlhf_type:
        yield Fault("rlhf.rlhf_type", algorithm, f"needs task='rlhf', which is {recipe.task!r}")
    if task is None and find_task(recipe.task, rlhf_type=algorithm):
        fitting = dict.fromkeys(repr(one.task) for one in TASKS if one.task_type == task_type)
        yield Fault("training.task_type", task_type, f"needs task={' or '.join(fitting)}, which is {recipe.task!r}")
    weights, rewards = recipe.grpo.reward_weights, [*recipe.grpo.reward_funcs, *recipe.grpo.reward_model]
    rewards += ["environment"] if recipe.rollout.use_gym_env else []
    if weights is not None and len(weights) != len(rewards):
        rule = f"must have one weight for each of the {len(rewards)} reward_funcs, reward models and environment"
        yield Fault("grpo.reward_weights", weights, rule)
    labels = recipe.training.num_labels
    if task_type == "seq_cls" and labels is None:
        yield Fault("training.num_labels", None, "is missing: task_type seq_cls needs it", bare=True)
    if task_type != "seq_cls" and labels is not None:
        yield Fault("training.num_labels", labels, f"needs task_type='seq_cls', which is {task_type!r}")
    yield from _kind_of_labels(recipe)


def _kind_of_labels(recipe: Recipe) -> Iterator[Fault]:
    training = recipe.training
    kind, labels = training.problem_type, training.num_labels
    if kind is not None and training.task_type != "seq_cls":
        yield Fault("training.problem_type", kind, f"needs task_type='seq_cls', which is {training.task_type!r}")
    if kind == "single_label_classification" and labels == 1:
        yield Fault("training.num_labels", 1, f"must be at least 2 for problem_type={kind!r}", try_=(2,))


def scores_are_of_samples(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Their loss is a mean over samples; what concerns tokens has no meaning for them."""
    training, kind = recipe.training, recipe.kind
    if kind is None or (kind.rows != "yes_no" and kind.head is None):
        return
    one = "scored token" if kind.scores_tokens else "sample"
    why = f"concerns the loss of tokens, and {kind.name} has one loss for each {one}"
    if training.calculate_per_token_loss:
        yield Fault("training.calculate_per_token_loss", True, why, try_=(False,))
    if recipe.data.loss_scale not in (None, kind.loss_scale):
        yield Fault("data.loss_scale", recipe.data.loss_scale, why, try_=(None,))
    for name in ("enable_dft_loss", "enable_channel_loss"):
        if getattr(training, name):
            yield Fault(f"training.{name}", True, why, try_=(False,))


def answers_differ_and_are_asked_for(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    kind, group = recipe.kind, recipe.reranker
    if kind is None or kind.rows != "yes_no":
        return
    if group.generative_reranker_positive_token == group.generative_reranker_negative_token:
        rule = "is also generative_reranker_negative_token; the answers must differ"
        yield Fault("reranker.generative_reranker_positive_token", group.generative_reranker_positive_token, rule)
    if recipe.data.truncation_strategy == "right":
        rule = "cuts off the end of a document's conversation, where the answer begins"
        yield Fault("data.truncation_strategy", "right", rule, try_=("delete", "left"))


def steps_are_kept(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.kind is None or recipe.kind.rows != "steps":
        return
    if not recipe.prm.step_separator:
        yield Fault("prm.step_separator", "", "must be a text that is not empty: a step is scored at its end")
    if recipe.data.truncation_strategy == "right":
        rule = "cuts off an answer's last steps and their labels"
        yield Fault("data.truncation_strategy", "right", rule, try_=("delete", "left"))


def embeddings_are_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    group, kind = recipe.embedding, recipe.kind
    if kind is None or kind.name != "embedding":
        return
    dims, weights = group.mrl_dims, group.mrl_weights
    if weights and len(weights) != len(dims):
        yield Fault("embedding.mrl_weights", weights, f"must have one weight for each of the {len(dims)} mrl_dims")
    if shape is not None and any(not 0 < one < shape.hidden_size for one in dims):
        yield Fault("embedding.mrl_dims", dims, f"must be between 0 and the model's hidden_size={shape.hidden_size}")
    if len({*dims}) < len(dims):
        yield Fault("embedding.mrl_dims", dims, "names a number of dimensions twice")
    if recipe.tuner.tuner_type == "lora" and recipe.bridge.merge_lora is False:
        rule = "saves an adapter of a causal model, which is none of an embedding model's; let it be merged"
        yield Fault("bridge.merge_lora", False, rule, try_=(True,))


RULES = (
    task_and_algorithm_agree,
    scores_are_of_samples,
    answers_differ_and_are_asked_for,
    steps_are_kept,
    embeddings_are_consistent,
)
