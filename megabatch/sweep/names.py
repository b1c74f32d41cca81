"""Names of a sweep's runs: short, stable, and valid as folder names: `tp4-pp2-ep4`, `lr1e-5-seed2`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LABELS = {
    "model.model": "model",
    "rlhf.rlhf_type": "rlhf",
    "tuner.tuner_type": "tuner",
    "data.dataset": "data",
    "resources.nodes": "nodes",
    "parallel.tensor_model_parallel_size": "tp",
    "parallel.pipeline_model_parallel_size": "pp",
    "parallel.num_virtual_stages_per_pipeline_rank": "vpp",
    "parallel.expert_model_parallel_size": "ep",
    "parallel.expert_tensor_parallel_size": "etp",
    "parallel.context_parallel_size": "cp",
    "parallel.sequence_parallel": "sp",
    "batch.micro_batch_size": "mbs",
    "batch.global_batch_size": "gbs",
    "recompute.recompute_granularity": "recompute",
    "data.max_length": "len",
    "dpo.loss_type": "loss",
    "kto.loss_type": "loss",
    "grpo.loss_type": "loss",
    "learning_rate.lr": "lr",
    "optimizer.weight_decay": "wd",
    "tuner.lora_rank": "rank",
    "tuner.lora_alpha": "alpha",
    "rollout.temperature": "temp",
    "grpo.num_generations": "gen",
}
"""Short names of commonly swept parameters, in their order in a run's name."""
_LAST = "training.seed"
_LONGEST_VALUE, _LONGEST_NAME = 32, 120
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")


def in_order(parameters: Iterable[str]) -> list[str]:
    """Sorts dotted names into the order of run names and the table, whatever the order of declaration."""
    ranks = {name: rank for rank, name in enumerate(_LABELS)}
    return sorted(parameters, key=lambda name: (name == _LAST, ranks.get(name, len(ranks)), name))


def labels(parameters: Sequence[str]) -> dict[str, str]:
    """A short label for each dotted name; those that would share one keep their dotted name."""
    short = {name: _LABELS.get(name, name.rpartition(".")[2]) for name in parameters}
    taken = list(short.values())
    return {name: label if taken.count(label) == 1 else name for name, label in short.items()}


def run_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each point (dotted name → value), distinct where the points are."""
    label = labels(in_order({name for point in points for name in point}))
    names = [_name(point, label) for point in points]
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}-{_digest(dict(point))}" if names.count(name) > 1 else name
        for name, point in zip(names, points, strict=True)
    ]


def _name(point: Mapping[str, Any], label: Mapping[str, str]) -> str:
    name = "-".join(_part(label[one], point[one]) for one in in_order(point)) or "base"
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(dict(point))}"


def _part(label: str, value: Any) -> str:
    """`tp4`, `loss_dapo`, `sp`, `no_sp`: an underscore separates text from its label, and a number from a digit."""
    if isinstance(value, bool):
        return label if value else f"no_{label}"
    text = value_text(value)
    return f"{label}{text}" if text[0].isdigit() and label[-1].isalpha() else f"{label}_{text}"


def value_text(value: Any) -> str:
    """A value in characters that are safe in file names; adds a hash to a value that they cannot express."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and value >= 0:
        return number_text(value)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if _PLAIN.fullmatch(text) and len(text) <= _LONGEST_VALUE:
        return text
    # the last part of a path or hub name is the most telling
    plain = re.sub(r"[^A-Za-z0-9]+", "_", text.rstrip("/").rpartition("/")[2]).strip("_")[:_LONGEST_VALUE]
    return ".".join(filter(None, (plain, _digest(value))))


def number_text(number: float) -> str:
    """The shortest text that reads back as the number: `1e-5`, `0.04`, `16`."""
    text = repr(number)
    if 0 < abs(number) < 1e-3:
        text = next(text for text in (f"{number:.{digits}e}" for digits in range(17)) if float(text) == number)
    digits, exponential, exponent = text.partition("e")
    return digits.removesuffix(".0") + (f"e{int(exponent)}" if exponential else "")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
