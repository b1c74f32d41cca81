"""Small runs of models with a head, and transformers' view of the same model and rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapted import make_base, opened
from runs import recipe, write_run

from megabatch import Model, Recipe

CLASSES = 3
GROUPS: dict[str, dict[str, Any]] = {
    "optimizer": {"clip_grad": 0.0, "adam_eps": 1e-3},
    "learning_rate": {"lr": 0.02, "min_lr": 0.02},
}


def write_rows(path: Path, label: Callable[[list[int], random.Random], Any], *, count: int, seed: int = 0) -> Path:
    """Texts, and every third row a question in turns, each with a label of its numbers."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            numbers = [rng.randint(0, 99) for _ in range(rng.randint(1, 6))]
            text = f"Is {' + '.join(map(str, numbers))} much?"
            said = {"messages": [{"role": "user", "content": text}]} if row % 3 == 2 else {"text": text}
            file.write(json.dumps({**said, "label": label(numbers, rng)}) + "\n")
    return path


LABELS: dict[str, Callable[[list[int], random.Random], Any]] = {
    "single_label_classification": lambda numbers, _: len(numbers) % CLASSES,
    "regression": lambda numbers, _: sum(numbers) / 100,
    "regression of three": lambda numbers, _: [x / 100 for x in (*numbers, 0, 0)[:CLASSES]],
    "multi_label_classification": lambda numbers, _: sorted({number % CLASSES for number in numbers}),
}


def classifier(folder: Path, kind: str, base: str | Path, /, **groups: dict[str, Any]) -> Recipe:
    """A recipe of four steps on rows with such labels."""
    problem_type, train = kind.split(" ", maxsplit=1)[0], folder / f"{kind}.jsonl"
    if not train.exists():
        write_rows(train, LABELS[kind], count=40)
        write_rows(folder / f"{kind}.validation.jsonl", LABELS[kind], count=7, seed=1)
    made = recipe(folder, "qwen3", **merged(GROUPS, groups))
    labels = 1 if kind == "regression" else CLASSES
    return replace(
        made,
        model=Model(model=str(base), torch_dtype="float32"),
        data=replace(made.data, dataset=[str(train)], val_dataset=[str(folder / f"{kind}.validation.jsonl")]),
        training=replace(made.training, task_type="seq_cls", num_labels=labels, problem_type=problem_type),
    )


def merged(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in first | second}


def stepped(run_dir: str, folder: str) -> dict[str, Any]:
    """Exports the model, then takes a step without an update; what was measured, the gradients and the step's rows."""
    with opened(run_dir) as (_, loop, progress):
        Path(folder).mkdir()
        loop.parts.export.save(loop.engine.model, loop.engine.ranks, Path(folder))
        step = next(loop.parts.steps.after(progress.cursor, loop.engine))
        result = loop.engine.step(
            step.packs, loop.parts.objective, totals=step.totals, filled=step.filled, accept=lambda measured: False
        )
        return {
            "metrics": {name: ratio.value for name, ratio in result.metrics.items()},
            "norm": result.grad_norm,
            "gradients": whole_gradients(loop.engine),
            "rows": [row for pack in step.packs for row in sequences(pack)],
            "labels": [labels for pack in step.packs for labels in labels_of_tokens(pack)],
        }


def labels_of_tokens(pack: Any) -> list[Any]:
    """The label of each token of each sequence as transformers has it; none without such labels."""
    if "right" not in pack.token_columns:
        return []
    labels_T = torch.where(pack.weights_T > 0, pack.token_columns["right"].long(), -100)
    starts, lengths = pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()
    return [labels_T[starts[n] : starts[n] + lengths[n]].numpy() for n in range(pack.sequences)]


def sequences(pack: Any) -> list[tuple[Any, dict[str, float]]]:
    """(token ids, columns) of each sequence of a row."""
    starts, lengths = pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()
    columns = {name: values.tolist() for name, values in pack.columns.items()}
    return [
        (pack.ids_T[starts[n] : starts[n] + lengths[n]].numpy(), {name: values[n] for name, values in columns.items()})
        for n in range(pack.sequences)
    ]


def whole_gradients(engine: Any) -> dict[str, Any]:
    """Of the model's own trained parameters by Hugging Face's names; on one rank."""
    from megabatch.converters.families import family_named
    from megabatch.converters.shards import assemble
    from megabatch.trainer.weights import bytes_of, placed

    family, shape = family_named(engine.model.shape.model_type), engine.model.shape
    shapes, found = family.hf_tensors(shape), {}
    for item in placed(engine.model, family.tensors(shape), engine.ranks):
        if item.is_copy or not item.parameter.requires_grad:
            continue
        padded = engine.model.padded_vocab_size if item.mapped.split == "vocab" else None
        for rows in assemble(item.mapped, [bytes_of(item.parameter.main_grad)], itemsize=4, padded_vocab=padded):
            whole = found.setdefault(rows.hf, torch.zeros(shapes[rows.hf]))
            part = torch.frombuffer(bytearray(rows.data), dtype=torch.float32).view(-1, *shapes[rows.hf][1:])
            whole[rows.row_start : rows.row_start + len(part)] = part
    return {name: gradient.numpy() for name, gradient in found.items()}


__all__ = ["CLASSES", "LABELS", "classifier", "make_base", "stepped", "write_run"]
