"""Whether a run can go on from another's checkpoint: steps left to train, and the same order of data."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.run_directory import RunDirectory
from megabatch.saved.find import FoundCheckpoint
from megabatch.saved.history import TRAINER

_ORDER = (("training", "seed"), ("data", "dataset_shuffle"))
"""Parameters that the order of a run's data depends on, as they are declared."""


def not_to_go_on(field: str, given: str, found: FoundCheckpoint, recipe: Recipe) -> Iterator[Fault]:
    """Faults of a checkpoint whose place in the data, and step, the run is to go on from."""
    yield from without_steps_left(field, given, found, recipe)
    run_json = RunDirectory(found.folder.parent.parent).run_json
    if not found.of_a_run or recipe.checkpoint.finetune or not run_json.is_file():
        return
    try:
        saved = json.loads(run_json.read_text(encoding="utf-8"))["recipe"]
        had = [saved[group][name] for group, name in _ORDER]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the trainer compares the data too
    for (group, name), old in zip(_ORDER, had, strict=True):
        if (own := getattr(getattr(recipe, group), name)) != old:
            rule = (
                f"is a checkpoint of a run with {group}.{name}={old}, whose place in the data {name}={own} orders "
                f"otherwise; set {name}={old}, or checkpoint.finetune=True to begin at step 0 with its weights alone"
            )
            yield Fault(field, given, rule)


def without_steps_left(field: str, given: str, found: FoundCheckpoint, recipe: Recipe) -> Iterator[Fault]:
    """A fault where the checkpoint's step is the run's last one or after it; nothing where the run counts epochs, for
    only the trainer knows their length."""
    last = recipe.training.train_iters
    if not found.of_a_run or recipe.checkpoint.finetune or last is None:
        return
    try:
        step = json.loads((found.folder / TRAINER).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the trainer reports a damaged one
    if isinstance(step, int) and step >= last:
        rule = f"goes on from step {step}, and training.train_iters={last} leaves it none; raise train_iters, or set "
        yield Fault(field, given, f"{rule}checkpoint.finetune=True to begin at step 0 with its weights alone")
