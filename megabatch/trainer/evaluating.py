"""Evaluates a run's model once, without an optimizer, with the task's own evaluator."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.errors import DataError
from megabatch.run_directory import ExitCode, RunDirectory, write_atomic
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.model_source import model_source
from megabatch.trainer.starting import start
from megabatch.trainer.sums import Ratio
from megabatch.trainer.tasks.table import opener

logger = logging.getLogger(__name__)


def evaluate(run: RunConfig, activity: Activity) -> ExitCode:
    """Writes `evaluation.json`. Raises: MegabatchError, on every rank."""
    directory = RunDirectory(Path(run.run_dir))
    with assemble.join_ranks(run) as ranks:
        heart = Heartbeat(directory, ranks.place)
        source = model_source(run, ranks)
        parts = opener(run)(run, source, ranks, busy=lambda: heart.beat("starting"))
        if parts.evaluator is None:
            raise DataError("there is nothing to evaluate: name data with --dataset, or with the recipe's val_dataset")
        engine = assemble.build_engine(
            run, ranks, train_iters=0, frozen=parts.frozen, following=parts.following, trains=False
        )
        checkpoints = assemble.make_checkpoints(run, ranks, source, parts.export, tuning=engine.model.tuning)
        start(run, engine, checkpoints, source)
        activity.at("evaluating", 0)
        started = time.perf_counter()
        found = parts.evaluator.evaluate(engine, on_batch=lambda: heart.beat("running"))
        if ranks.is_main:
            write_atomic(directory.evaluation, text_of(run, found, time.perf_counter() - started))
        heart.beat("done", force=True)
    return ExitCode.DONE


def text_of(run: RunConfig, found: Mapping[str, Ratio], seconds: float) -> str:
    """The JSON of an evaluation: what was evaluated, each metric, and how many things it is a mean over."""
    recipe = run.recipe
    document = {
        "task": run.task.name,
        "model": recipe.model.model,
        "adapters": list(recipe.bridge.adapters),
        "dataset": list(recipe.data.val_dataset or recipe.data.dataset),
        "split_dataset_ratio": None if recipe.data.val_dataset else recipe.data.split_dataset_ratio,
        "metrics": {name: ratio.value if ratio.count else None for name, ratio in found.items()},
        "counts": {name: ratio.count for name, ratio in found.items()},
        "seconds": round(seconds, 3),
        "world_size": run.layout.world_size,
    }
    return json.dumps(document, indent=2) + "\n"
