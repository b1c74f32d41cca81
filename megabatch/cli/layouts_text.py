"""The layouts of a recipe as a table, with pruned ones counted by reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megabatch.cli.estimate_text import estimate_document
from megabatch.entry.layouts import JudgedLayout
from megabatch.plan.gpus import Gpu
from megabatch.table import table

SHOWN = 20
"""How many runnable layouts are listed unless the user asks for all."""
_SIZES = ("tp", "pp", "vp", "cp", "ep", "etp", "micro_batch_size")


def layouts_text(judged: Sequence[JudgedLayout], *, gpus: int, gpu: Gpu, limit_gib: float, everything: bool) -> str:
    """Fastest first. Args: everything: list all runnable layouts, and each of the others with its own reason."""
    kept = [one for one in judged if one.verdict.keep]
    pruned = [one for one in judged if not one.verdict.keep]
    listed = list(judged) if everything else kept[:SHOWN]
    lines = [
        f"{len(kept)} of {len(judged)} layouts can run on {gpus} x {gpu.name} in {round(limit_gib, 1):g} GiB of "
        f"{gpu.memory_gib:g} each; seconds and GiB are estimates"
    ]
    if listed:
        header = ["tp", "pp", "vpp", "cp", "ep", "etp", "micro", "GiB/rank", "s/step", "tokens/s", "MFU", ""]
        lines += ["", table(header, [_row(one) for one in listed])]
    if not everything:
        lines += [f"… and {len(kept) - SHOWN} more; --all shows them"] if len(kept) > SHOWN else []
        lines += ["", *_reasons(pruned)]
    return "\n".join(lines)


def _row(one: JudgedLayout) -> list[str]:
    sizes = [str(getattr(one.choice, name)) for name in _SIZES]
    estimate = one.verdict.estimate
    if estimate is None:
        return [*sizes, "-", "-", "-", "-", one.verdict.reason]
    step = estimate.step
    figures = [
        f"{estimate.memory.total_gib:.1f}",
        f"{step.total_s:.2f}",
        f"{step.tokens_per_s:,.0f}",
        f"{100 * step.mfu:.1f}%",
    ]
    return [*sizes, *figures, one.verdict.reason]


def _reasons(pruned: Sequence[JudgedLayout]) -> list[str]:
    """How many layouts are left out for each reason, in the first one's words."""
    groups: dict[str, list[JudgedLayout]] = {}
    for one in pruned:
        groups.setdefault(_group(one.verdict.reason), []).append(one)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [f"{len(found):5} pruned: {found[0].verdict.reason}" for found in ordered]


def _group(reason: str) -> str:
    """The reason without its numbers and what follows them: one text for one rule."""
    return re.sub(r"\d[\d.]*", "#", re.split(r"; try| \(", reason)[0])


def layouts_document(judged: Sequence[JudgedLayout], gpu: Gpu) -> list[dict[str, Any]]:
    """For programs: every layout, fastest first."""
    return [
        {
            **asdict(one.choice),
            "keep": one.verdict.keep,
            "reason": one.verdict.reason,
            "estimate": estimate_document(one.verdict.estimate, gpu) if one.verdict.estimate else None,
        }
        for one in judged
    ]
