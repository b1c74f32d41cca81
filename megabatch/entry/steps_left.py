"""Whether a run that goes on from another's checkpoint has steps left to train."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.saved.find import FoundCheckpoint
from megabatch.saved.history import TRAINER


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
