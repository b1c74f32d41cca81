"""Rules for the length of a run, for when it saves and evaluates, and for its resources."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from megabatch.config.checkpoint import Checkpoint
from megabatch.config.evaluation_metrics import evaluation_metrics
from megabatch.config.recipe import Recipe
from megabatch.config.walltime import seconds
from megabatch.errors import ConfigError, Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def one_of_steps_and_epochs(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    steps, epochs = recipe.training.train_iters, recipe.training.max_epochs
    if steps is None and epochs is None:
        yield Fault("training.train_iters", None, "is missing; give it or max_epochs", bare=True)
    if steps is not None and epochs is not None and not recipe.data.streaming:
        yield Fault(
            "training.train_iters", steps, f"and max_epochs={epochs} both decide the length; set one of them to None"
        )


def safetensors_are_saved_with_checkpoints(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    group, name = recipe.checkpoint, "checkpoint.save_safetensors_interval"
    interval = group.save_safetensors_interval
    if interval is None:
        return
    if not group.save_safetensors:
        yield Fault(name, interval, "has no effect with save_safetensors=False; set one of them", try_=(None,))
    elif group.no_save_optim:
        yield Fault(name, interval, "with no_save_optim=True leaves the checkpoints in between empty", try_=(None,))
    if group.save_strategy == "steps" and interval % group.save_interval:
        below = interval // group.save_interval * group.save_interval
        near = tuple(n for n in (below, below + group.save_interval) if n)
        yield Fault(name, interval, f"must be a multiple of save_interval={group.save_interval}", try_=near)


def epochs_have_no_intervals(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """`save_strategy` epoch saves and evaluates after each epoch; an interval of steps would be silently lost."""
    if recipe.checkpoint.save_strategy != "epoch":
        return
    given = (
        ("checkpoint.save_interval", recipe.checkpoint.save_interval, Checkpoint().save_interval),
        ("evaluation.eval_interval", recipe.evaluation.eval_interval, None),
    )
    for field, value, default in given:
        if value not in (default, 1):
            yield Fault(field, value, "has no effect with save_strategy='epoch', which saves after each", try_=(1,))


def the_best_is_evaluated_and_saved(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    group, field = recipe.checkpoint, "checkpoint.metric_for_best_model"
    metric, evaluates_every = group.metric_for_best_model, recipe.evaluation.eval_interval
    if metric is None:
        if group.greater_is_better is not None:
            rule = "needs metric_for_best_model, which is None"
            yield Fault("checkpoint.greater_is_better", group.greater_is_better, rule, try_=(None,))
        return
    if not (recipe.data.val_dataset or recipe.data.split_dataset_ratio):
        yield Fault(field, metric, "needs validation data: val_dataset or split_dataset_ratio", try_=(None,))
    if group.save_strategy == "steps" and evaluates_every and group.save_interval % evaluates_every:
        rule = f"must be a multiple of eval_interval={evaluates_every} for metric_for_best_model={metric!r}"
        yield Fault("checkpoint.save_interval", group.save_interval, rule, try_=(evaluates_every,))


def the_best_is_of_a_metric(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    metric, found = recipe.checkpoint.metric_for_best_model, evaluation_metrics(recipe)
    if metric is None or found is None or (name := metric.removeprefix("eval_")) in found:
        return
    names = ", ".join((*found.names, *(f"{start}…" for start in found.prefixes)))
    rule = f"is no metric of this run's evaluation, which has {names}"
    near = get_close_matches(name, found.names, n=2)
    yield Fault("checkpoint.metric_for_best_model", metric, rule, try_=near)


def backend_fits_the_device(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    gpus, backend = recipe.resources.gpus_per_node, recipe.parallel.distributed_backend
    if gpus == 0 and backend == "nccl":
        rule = "needs GPUs, but resources.gpus_per_node is 0"
        yield Fault("parallel.distributed_backend", "nccl", rule, try_=("gloo",))
    if gpus and backend == "gloo":
        rule = f"is for runs on CPUs, but resources.gpus_per_node is {gpus}"
        yield Fault("parallel.distributed_backend", "gloo", rule, try_=("nccl",))


def each_rank_has_its_gpu(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    tasks, gpus = recipe.resources.tasks_per_node, recipe.resources.gpus_per_node
    if tasks is not None and gpus and tasks > gpus:
        yield Fault("resources.tasks_per_node", tasks, f"must be at most gpus_per_node={gpus}", try_=(gpus,))


def time_covers_the_signal(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    resources = recipe.resources
    try:
        limit = seconds(resources.time)
    except ConfigError as error:
        yield Fault("resources.time", resources.time, str(error), try_=("12:00:00",))
        return
    if resources.signal_delay_s >= limit:
        rule = f"must be below time={resources.time!r}, which is {limit} s"
        yield Fault("resources.signal_delay_s", resources.signal_delay_s, rule, try_=(max(1, limit // 4),))


RULES = (
    one_of_steps_and_epochs,
    safetensors_are_saved_with_checkpoints,
    epochs_have_no_intervals,
    the_best_is_evaluated_and_saved,
    the_best_is_of_a_metric,
    backend_fits_the_device,
    each_rank_has_its_gpu,
    time_covers_the_signal,
)
