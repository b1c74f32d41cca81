"""A page about runs: where they are, curves over one another, what they cost, why they failed, how they differ."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megabatch.insight import page
from megabatch.insight.chart import Bar, Series, line_chart, timeline
from megabatch.insight.comparison import flat
from megabatch.insight.completions import completions
from megabatch.insight.curves import Point, curve, final_history
from megabatch.insight.diagnosis import Diagnosis, diagnose
from megabatch.insight.goodput import Attempt
from megabatch.insight.masking import Masker
from megabatch.insight.overview import Overview, history, overview, run_json
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.queue import State
from megabatch.values import dataclass

_CHARTS = (
    ("loss", "Loss"),
    ("grad_norm", "Gradient norm"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_s", "Throughput (tokens/s)"),
    ("step_s", "Step time (s)"),
    ("memory_gib", "Peak memory of rank 0 (GiB)"),
    ("mfu", "Model FLOPs utilisation"),
    ("reward", "Reward"),
    ("reward_std", "Reward's standard deviation within a group"),
    ("completion_length", "Completion length (tokens)"),
    ("cut_off", "Share of completions cut off"),
    ("kl", "KL to the reference"),
    ("entropy", "Entropy"),
    ("clip_low", "Share of tokens clipped below"),
    ("clip_high", "Share of tokens clipped above"),
    ("rollout_kl", "KL between trainer and rollout engine"),
    ("staleness", "Staleness (policy versions)"),
    ("staleness_max", "Largest staleness of a completion (policy versions)"),
)
"""Name in `metrics.jsonl`, and title; a chart that no run has points for is left out."""
_REWARD = "reward_"
_NO_REWARDS = ("reward_std", "reward_equal", "reward_s")
"""Metrics whose names begin like those of single rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Everything that the page needs from one run."""

    overview: Overview
    config: Mapping[str, Any]
    attempts: list[Attempt]
    curves: Mapping[str, list[Point]]
    evaluation: list[Point]
    diagnosis: Diagnosis | None


def report(runs: Sequence[Path], *, mask: Masker | None = None) -> str:
    """One HTML document; masks secrets and escapes everything that runs wrote."""
    mask = mask or Masker()
    found = [_read(one) for one in overview(runs)]
    labels = [mask.text(_label(run)) for run in found]
    title = "Runs: " + ", ".join(labels[:3]) + (" …" if len(labels) > 3 else "")
    body = [
        f"<h1>{escape(title)}</h1>",
        page.paragraph(time.strftime("Created on %Y-%m-%d at %H:%M %Z by megabatch report."), soft=True),
        page.legend(labels),
        page.section("Progress", _progress(found)),
        page.section("Curves", f'<div class="charts">{_charts(found, labels)}</div>'),
        page.section("Time on nodes", _timeline(found, labels)),
        page.section("Model and layout", _layouts(found)),
        page.section("How they differ", _differences(found, mask)),
        *(completions(run.overview.status.run, label, mask) for run, label in zip(found, labels, strict=True)),
        *(_failure(run, label, mask) for run, label in zip(found, labels, strict=True)),
    ]
    return page.page(title, "".join(body))


def _read(one: Overview) -> _Run:
    run = RunDirectory(one.status.run)
    train, evaluations = final_history(run.metrics)
    failed = one.status.state not in (State.COMPLETED, State.NOT_SUBMITTED)
    return _Run(
        overview=one,
        config=run_json(run.path),
        attempts=history(one.status),
        curves={name: curve(train, name) for name in [*dict(_CHARTS), *_rewards_in(train)]},
        evaluation=curve(evaluations, "eval_loss"),
        diagnosis=diagnose(run.path) if failed else None,
    )


def _label(run: _Run) -> str:
    folder = run.overview.status.run
    return f"{run.overview.name or folder.name} ({folder.name})"


def _progress(found: Sequence[_Run]) -> str:
    rows = []
    for number, run in enumerate(found, 1):
        one = run.overview
        rows.append((
            str(number),
            one.status.state.value,
            "-" if one.step is None else f"{one.step} of {one.train_iters or '?'}",
            "-" if one.loss is None else f"{one.loss:.4f}",
            "-" if not run.evaluation else f"{run.evaluation[-1][1]:.4f}",
            "-" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
            "-" if one.goodput is None else f"{one.goodput:.1%}",
            "-" if one.allocated_gpu_h is None else f"{one.allocated_gpu_h:,.2f}",
            str(one.attempts),
            str(one.status.run),
        ))  # fmt: skip
    header = ("", "State", "Step", "Loss", "Validation loss", "Tokens/s", "Goodput", "GPU-hours", "Attempts", "Folder")
    return page.table(header, rows, caption="Progress of each run")


def _charts(found: Sequence[_Run], labels: Sequence[str]) -> str:
    parts = []
    rewards = sorted({name for run in found for name in run.curves} - dict(_CHARTS).keys())
    for name, title in (*_CHARTS, *((name, f"Reward {name.removeprefix(_REWARD)}") for name in rewards)):
        series = [Series(label, index, run.curves.get(name, [])) for index, (run, label) in _numbered(found, labels)]
        parts.append(page.figure(title, line_chart(series, title=title)))
        if name == "loss":
            series = [
                Series(label, index, run.evaluation, dotted=True) for index, (run, label) in _numbered(found, labels)
            ]
            parts.append(page.figure("Validation loss", line_chart(series, title="Validation loss")))
    return "".join(parts)


def _numbered(found: Sequence[_Run], labels: Sequence[str]) -> list[tuple[int, tuple[_Run, str]]]:
    return list(enumerate(zip(found, labels, strict=True)))


def _timeline(found: Sequence[_Run], labels: Sequence[str]) -> str:
    bars = [
        Bar(index, attempt.start, attempt.end, _outcome(attempt, run), _said(attempt, run, index))
        for index, run in enumerate(found)
        for attempt in run.attempts
    ]
    rows = [
        (
            str(bar.row + 1),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(bar.start)),
            f"{(bar.end - bar.start) / 60:.1f} min",
            bar.label,
        )
        for bar in bars
    ]
    if not bars:
        return ""
    title = "Hours since the first attempt; one row per run"
    listed = page.table(("Run", "From", "For", "Attempt"), rows, caption="Every attempt of each run")
    return (
        page.figure(title, timeline(labels, bars, title=title))
        + f"<details><summary>All attempts</summary>{listed}</details>"
    )


def _outcome(attempt: Attempt, run: _Run) -> str:
    if attempt.exit_code is None:
        newest = attempt is run.attempts[-1]
        return "running" if newest and run.overview.status.state is State.RUNNING else "failed"
    return {ExitCode.DONE.value: "done", ExitCode.REQUEUE.value: "saved"}.get(attempt.exit_code, "failed")


def _said(attempt: Attempt, run: _Run, index: int) -> str:
    how = {"done": "done", "saved": "saved and stopped", "running": "runs"}.get(_outcome(attempt, run))
    how = how or (f"exit code {attempt.exit_code}" if attempt.exit_code is not None else "killed")
    return f"run {index + 1}, attempt {attempt.number}, job {attempt.job_id} on {attempt.nodes or '?'}: {how}"


def _layouts(found: Sequence[_Run]) -> str:
    names = ("world_size", "tp", "pp", "vp", "cp", "dp", "ep", "etp", "num_microbatches")
    rows = []
    for number, run in enumerate(found, 1):
        layout, shape = (run.config.get(name) or {} for name in ("layout", "shape"))
        model = f"{shape.get('architecture', '?')}, {shape.get('num_layers')} layers of {shape.get('hidden_size')}"
        rows.append((str(number), model, *(str(layout.get(name, "-")) for name in names)))
    return page.table(("", "Model", *names), rows, caption="Model and layout of each run")


def _differences(found: Sequence[_Run], mask: Masker) -> str:
    """Fields of the recipes that differ between runs."""
    if len(found) < 2:
        return ""
    recipes = [dict(flat(run.config.get("recipe"))) for run in found]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    rows = []
    for name in names:
        values = [json.dumps(recipe.get(name)) for recipe in recipes]
        if len(set(values)) > 1:
            rows.append((name, *(mask.text(value) for value in values)))
    header = ("Parameter", *(str(number) for number in range(1, len(found) + 1)))
    return page.table(header, rows, caption="Parameters that differ") if rows else page.paragraph("They do not.")


def _rewards_in(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics of single rewards."""
    last = lines[-1] if lines else {}
    parts = tuple(f"{name}{end}" for name in last for end in ("_sum", "_count"))
    return [n for n in last if n.startswith(_REWARD) and n not in (*_NO_REWARDS, *parts)]


def _failure(run: _Run, label: str, mask: Masker) -> str:
    why = run.diagnosis
    if why is None or why.cause is None:
        return ""
    place = "" if why.rank is None else f" First: rank {why.rank}{f' on {why.node}' if why.node else ''}."
    attempt = "" if why.attempt is None else f"attempt {why.attempt}: "
    said = page.paragraph(mask.text(f"{attempt}{why.cause.title} [{why.cause.name}].{place}"))
    said += page.lines([mask.text(why.evidence)] if why.evidence else [])
    said += page.paragraph(f"Fix: {why.cause.fix}")
    if why.last_lines and why.log is not None:
        said += page.paragraph(f"Last lines of {why.log.name}:", soft=True)
        said += page.lines([mask.text(line) for line in why.last_lines])
    return page.section(f"Why {label} failed", said)
