"""The table of a sweep's runs: a line per point, kept or pruned and why, and the total cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megabatch.config.recipe import Recipe
from megabatch.config.walltime import seconds
from megabatch.plan.memory import MARGIN
from megabatch.slurm.array import JobArray
from megabatch.sweep.candidates import Candidate, Candidates
from megabatch.sweep.names import in_order, labels, number_text
from megabatch.table import text_width

_REASON_WIDTH = 150


def table_text(
    found: Candidates, *, arrays: Sequence[JobArray], starts: Mapping[str, str], left: Mapping[str, str]
) -> str:
    """The table and its totals.

    Args: `arrays` are those that would be submitted, none for `--local`; `starts` tells for a
    point's name when Slurm would start it; `left` why a point's run is not started: it runs or is done.
    """
    swept = in_order(found.parameters)
    label = labels(swept)
    estimated = any(candidate.estimate for candidate in found.all)
    header = [label[name] for name in swept]
    header += ["dp"] * _splits(swept) + ["GiB/rank", "s/step", "GPU-hours"] * estimated + ["start"] * bool(starts)
    rows = [[*header, "verdict"]]
    for candidate in found.all:
        row = [_shown(candidate, name) for name in swept]
        if _splits(swept):
            layout = candidate.launch.layout
            row.append("-" if layout is None else str(layout.dp))
        if estimated:
            row += _estimate(candidate)
        if starts:
            row.append(starts.get(candidate.point.name, "-"))
        rows.append([*row, _verdict(candidate, left)])
    widths = [max(text_width(row[i]) for row in rows) for i in range(len(header))]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join([*lines, _sum(found, arrays, left)])


def _splits(swept: Sequence[str]) -> bool:
    return any(name.startswith(("parallel.", "resources.")) for name in swept)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [" " * (width - text_width(cell)) + cell for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*cells, row[-1]])


def _shown(candidate: Candidate, name: str) -> str:
    """A value as people write it, on one line."""
    group, _, field = name.partition(".")
    value: Any = getattr(getattr(candidate.point.recipe, group), field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _estimate(candidate: Candidate) -> list[str]:
    estimate = candidate.estimate
    if estimate is None:
        return ["-", "-", "-"]
    hours = gpu_hours(candidate)
    step = f"{estimate.step.total_s:.3g}"
    return [f"{estimate.memory.total_gib:.1f}", step, "-" if hours is None or not candidate.kept else _hours(hours)]


def gpu_hours(candidate: Candidate) -> float | None:
    """GPU-hours of all steps by the estimate; None if the steps or the estimate are unknown."""
    recipe, estimate = candidate.point.recipe, candidate.estimate
    if estimate is None or recipe.training.train_iters is None:
        return None
    return estimate.step.total_s * recipe.training.train_iters * _gpus(recipe) / 3600


def _gpus(recipe: Recipe) -> int:
    return recipe.resources.nodes * recipe.resources.gpus_per_node


def _verdict(candidate: Candidate, left: Mapping[str, str]) -> str:
    if candidate.pruned:
        return f"pruned: {' '.join(candidate.pruned.split())[:_REASON_WIDTH]}"
    if candidate.unbuilt:
        return "not built yet"
    return left.get(candidate.point.name, "run")


def _sum(found: Candidates, arrays: Sequence[JobArray], left: Mapping[str, str]) -> str:
    kept = [candidate for candidate in found.kept if candidate.point.name not in left]
    parts = [f"{len(kept)} run{'s' * (len(kept) != 1)}"]
    if arrays:
        sizes = [len(array.jobs) for array in arrays]
        listed = " and ".join(map(str, sizes)) if len(sizes) <= 4 else f"{min(sizes)} to {max(sizes)}"
        parts[0] += f" in {len(sizes)} array{'s' * (len(sizes) != 1)} of {listed}"
        if found.max_parallel is not None:
            parts.append(f"at most {sum(array.max_parallel or 0 for array in arrays)} at a time")
    parts += _resources([candidate.point.recipe for candidate in kept])
    hours = [gpu_hours(candidate) for candidate in kept]
    if kept and None not in hours:
        kinds = [candidate.point.recipe.kind for candidate in kept]
        generation = " and the time to generate" if any(kind and kind.generates for kind in kinds) else ""
        parts.append(f"about {_hours(sum(filter(None, hours)))} GPU-hours{generation}")
    elif any(_gpus(candidate.point.recipe) for candidate in kept):
        most = sum(_gpus(c.point.recipe) * seconds(c.point.recipe.resources.time) / 3600 for c in kept)
        parts.append(f"at most {_hours(most)} GPU-hours by their time limits")
    text = ", ".join(parts)
    if pruned := len(found.all) - len(found.kept):
        text += f"; {pruned} pruned"
    if found.gpu is not None and any(candidate.estimate for candidate in found.all):
        gpu = found.gpu
        text += f"; estimated for {gpu.name} GPUs, {MARGIN:.0%} of whose {gpu.memory_gib:g} GiB stay free (--gpu)"
    return text


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _resources(recipes: Sequence[Recipe]) -> list[str]:
    """`16 GPUs each`, or the number of ranks without GPUs."""
    sizes = sorted({(_gpus(recipe) or recipe.resources.world_size, bool(_gpus(recipe))) for recipe in recipes})
    if len(sizes) != 1:
        return []
    number, gpus = sizes[0]
    word = "GPU" if gpus else "rank"
    return [f"{number} {word}{'s' * (number != 1)} each"]
