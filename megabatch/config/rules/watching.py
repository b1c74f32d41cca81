"""Guards, profiler and trackers."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.monitoring import Logging
from megabatch.config.recipe import Recipe
from megabatch.config.watching import Watching, profiled
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def profiled_steps_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    text, name = recipe.watching.profile_steps, "watching.profile_steps"
    if text is None:
        return
    try:
        steps = profiled(text)
    except ValueError:
        yield Fault(name, text, "must be the first and the last step with a colon between", try_=("10:12",))
        return
    last = recipe.training.train_iters
    if last is not None and steps[-1] > last:
        yield Fault(name, text, f"must end at step train_iters={last} or before")


def profiled_ranks_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    ranks, world, name = recipe.watching.profile_ranks, recipe.resources.world_size, "watching.profile_ranks"
    if ranks != Watching().profile_ranks and recipe.watching.profile_steps is None:
        yield Fault(name, ranks, "has no effect without profile_steps")
    if absent := [rank for rank in ranks if not 0 <= rank < world]:
        yield Fault(name, ranks, f"has {absent[0]}, but the {world} ranks are 0 to {world - 1}", try_=((0,),))


def spikes_are_looked_for(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    default = Watching()
    if recipe.watching.check_for_spiky_loss is not None:
        return
    for name in ("spiky_loss_window", "spiky_loss_sigma"):
        if (value := getattr(recipe.watching, name)) != getattr(default, name):
            rule = "has no effect without check_for_spiky_loss"
            yield Fault(f"watching.{name}", value, rule, try_=("check_for_spiky_loss=skip",))


def the_tracker_is_named(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.logging.report_to is not None:
        return
    for name in ("wandb_project", "wandb_exp_name", "wandb_save_dir"):
        if (value := getattr(recipe.logging, name)) != getattr(Logging(), name):
            yield Fault(f"logging.{name}", value, "has no effect without report_to", try_=("report_to=wandb",))


RULES = (profiled_steps_exist, profiled_ranks_exist, spikes_are_looked_for, the_tracker_is_named)
