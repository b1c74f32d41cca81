"""Estimates for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from megabatch.plan.figures import GIB, Estimate, MemoryEstimate
from megabatch.plan.gpus import Gpu
from megabatch.plan.memory import MARGIN, usable_gib
from megabatch.table import table

_KINDS = tuple(field.name for field in fields(MemoryEstimate))


def estimate_text(estimate: Estimate, gpu: Gpu) -> str:
    """Memory by kind of each pipeline stage's heaviest rank, and where a step's time goes."""
    step = estimate.step
    communication = " + ".join(f"{kind} {seconds:.2f}" for kind, seconds in step.communication_s.items() if seconds)
    parts = [f"compute {step.compute_s:.2f}", f"bubble {step.bubble_s:.2f}", f"optimizer {step.optimizer_s:.2f}"]
    lines = [
        f"estimate on {gpu.name} ({gpu.memory_gib:g} GiB): up to {estimate.memory.total_gib:.1f} GiB per rank, "
        f"{step.total_s:.2f} s per step",
        "",
        memory_table(estimate.stages),
        "",
        f"seconds      {' + '.join(parts)} + communication {sum(step.communication_s.values()):.2f}"
        + (f" ({communication})" if communication else ""),
        f"operations   {step.model_flops:.3g} FLOP a step, {100 * step.mfu:.1f}% of the GPUs' peak (MFU)",
        f"tokens       {step.tokens:,} a step, {step.tokens_per_s:,.0f}/s",
    ]
    taken = estimate.memory.total_gib
    if taken > gpu.memory_gib:
        lines.append(f"{'note':12} a rank needs more than the {gpu.memory_gib:g} GiB of a {gpu.name}")
    elif taken > usable_gib(gpu):
        lines.append(
            f"{'note':12} this leaves less than {MARGIN:.0%} of a {gpu.name} as a margin for what the estimates miss"
        )
    return "\n".join(lines)


def memory_table(stages: Sequence[MemoryEstimate]) -> str:
    """GiB by kind, one row for each pipeline stage."""
    rows = []
    for number, stage in enumerate(stages):
        heaviest = " <- heaviest" if len(stages) > 1 and stage is max(stages, key=lambda found: found.total) else ""
        kinds = [f"{getattr(stage, kind) / GIB:.1f}" for kind in _KINDS]
        rows.append([str(number), *kinds, f"{stage.total_gib:.1f}{heaviest}"])
    return table(["stage", *_KINDS, "GiB a rank"], rows)


def estimate_document(estimate: Estimate, gpu: Gpu) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    step = estimate.step
    return {
        "gpu": asdict(gpu),
        "parameters": estimate.parameters,
        "memory": _memory_document(estimate.memory),
        "stages": [_memory_document(stage) for stage in estimate.stages],
        "step": {
            **asdict(step),
            "total_s": step.total_s,
            "tokens_per_s": step.tokens_per_s,
            "mfu": step.mfu,
        },
    }


def _memory_document(memory: MemoryEstimate) -> dict[str, int]:
    return {**asdict(memory), "total": memory.total}
