"""Judging layouts before anything is queued: every one on a number of GPUs, and points of a sweep one by one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from measure import ROOT, Figure, median, sized

T = TypeVar("T")
TIMES = sized(5, 1)
POINTS = sized(1000, 5)


def plan() -> list[Figure]:
    """Processor time of `megabatch plan --gpus`, and of 1,000 verdicts that no rule or screening shortens."""
    from megabatch.cli.recipe_file import load_recipe
    from megabatch.converters.families import family_of
    from megabatch.entry.estimate import estimate_of, verdict_of
    from megabatch.entry.layouts import judged_layouts
    from megabatch.plan.gpus import GPUS
    from megabatch.plan.published_models import KNOWN_MODELS

    recipe = load_recipe(ROOT / "recipes" / "qwen3_moe_sft.py")()
    shape = family_of(KNOWN_MODELS[recipe.model.model or ""]).shape(KNOWN_MODELS[recipe.model.model or ""])
    recipe, gpu = replace(recipe, batch=replace(recipe.batch, global_batch_size=1024)), GPUS["H100"]
    figures = []
    for gpus in sized((16, 1024), (16,)):
        seconds, judged = _timed(lambda gpus=gpus: judged_layouts(recipe, shape, gpus=gpus, gpu=gpu))
        estimated = sum(one.verdict.estimate is not None for one in judged)
        note = f"{len(judged):,} layouts, {estimated:,} estimated; processor, median of {TIMES}"
        figures.append(Figure(name=f"plan all layouts of {gpus} GPUs", value=seconds, unit="s", note=note))
        each = seconds / len(judged) * 1000
        figures.append(
            Figure(name=f"plan 1,000 layouts of {gpus} GPUs", value=each, unit="s", target=1, note="the same, scaled")
        )
    batches = itertools.islice(itertools.count(1), POINTS)
    points = [replace(recipe, batch=replace(recipe.batch, global_batch_size=1024 * count)) for count in batches]
    whole, _ = _timed(lambda: [verdict_of(point, shape, gpu=gpu, variant_of=recipe) for point in points])
    figures.append(
        Figure(name="verdicts on 1,000 points that all run", value=whole, unit="s", target=1, note="nothing pruned")
    )
    alone, _ = _timed(lambda: [estimate_of(point, shape, gpu) for point in points])
    figures.append(Figure(name="… of which estimates", value=alone, unit="s"))
    return figures


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    """Median processor seconds, and the result."""
    seconds = []
    for _ in range(TIMES):
        before = time.process_time()
        result = function()
        seconds.append(time.process_time() - before)
    return median(seconds), result
