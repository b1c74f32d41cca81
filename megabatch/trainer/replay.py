"""One update of a GRPO run once more, on one process: from the ledger's completions and the checkpoint before it.

A program, started by `megabatch replay`: python -m megabatch.trainer.replay RUN_DIR --step N. It prints one JSON
object: the loss, the gradient norm and the other numbers of the update. It changes nothing in the run directory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megabatch.config.layout import layout_of
from megabatch.config.parallel import Parallel
from megabatch.config.run import RunConfig, derived
from megabatch.errors import CheckpointError, ConfigError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.trainer import failures

if TYPE_CHECKING:
    from megabatch.rl.rounds import Rolled
    from megabatch.trainer.engine import Engine, StepResult
    from megabatch.trainer.ranks import Ranks
    from megabatch.trainer.steps import Step


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of `ExitCode`."""
    parser = argparse.ArgumentParser(prog="megabatch.trainer.replay", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        run = RunConfig.load(RunDirectory(given.run).run_json)
        import torch

        alone = in_one_process(run, gpus=int(bool(run.recipe.resources.gpus_per_node) and torch.cuda.is_available()))
        result = replayed(run, alone, given.step)
    except Exception as e:
        return failures.report(e)
    print(json.dumps({name: ratio.value for name, ratio in result.metrics.items()} | {"grad_norm": result.grad_norm}))
    return ExitCode.DONE


def in_one_process(run: RunConfig, *, gpus: int) -> RunConfig:
    """The same run without parallelism. Raises: ConfigError where that would be another computation."""
    recipe = run.recipe
    dropout = {
        "model.attention_dropout": recipe.model.attention_dropout,
        "model.hidden_dropout": recipe.model.hidden_dropout,
        **({"tuner.lora_dropout": recipe.tuner.lora_dropout} if recipe.tuner.tuner_type == "lora" else {}),
    }
    if run.layout.world_size > 1 and (drawn := [f"{name}={value}" for name, value in dropout.items() if value]):
        raise ConfigError(
            f"{', '.join(drawn)}: each of the run's {run.layout.world_size} ranks drew random numbers of its own, "
            "which one process cannot repeat; only runs without dropout, or of one process, can be replayed"
        )
    alone = replace(
        recipe,
        parallel=Parallel(
            distributed_backend="nccl" if gpus else "gloo",
            use_distributed_optimizer=False,
            distributed_timeout_minutes=recipe.parallel.distributed_timeout_minutes,
        ),
        resources=replace(recipe.resources, nodes=1, tasks_per_node=1, gpus_per_node=gpus),
    )
    layout = layout_of(alone, run.shape)
    assert layout is not None, "a batch divides by one rank"
    return replace(run, recipe=derived(alone, shape=run.shape, run_dir=Path(run.run_dir)), layout=layout)


def replayed(run: RunConfig, alone: RunConfig, step: int) -> StepResult:
    """Repeats the update. Args: `alone`: the run as it is repeated.

    Raises: RewardError for a step that the ledger lacks, CheckpointError without the state before it.
    """
    from megabatch.ledger.reader import Reader
    from megabatch.trainer.main import prepare_device

    if run.recipe.grpo.router_replay_mode != "disabled":
        raise ConfigError(
            f"grpo.router_replay_mode={run.recipe.grpo.router_replay_mode!r}: the ledger does not keep the experts of "
            "every token, which this run's updates replay"
        )
    prepare_device(alone)
    from megabatch.trainer import assemble
    from megabatch.trainer.rl.recorded import rolled
    from megabatch.trainer.tasks.grpo import objective_of

    completions = [rolled(record) for record in Reader(RunDirectory(Path(run.run_dir)).ledger).records(step)]
    with assemble.join_ranks(alone) as ranks:
        engine = _before(step, run, alone, ranks)
        batch = _as_shared(run, ranks, completions)
        return engine.step(batch.packs, objective_of(run), totals=batch.totals, filled=batch.filled)


def _before(step: int, run: RunConfig, alone: RunConfig, ranks: Ranks) -> Engine:
    """The run's model and optimizer before a step."""
    from megabatch.trainer import assemble
    from megabatch.trainer.checkpoints.progress import Progress
    from megabatch.trainer.exports.of_run import export_of
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.starting import start

    source = model_source(alone, ranks)
    declared = run.recipe.training.train_iters
    engine = assemble.build_engine(alone, ranks, train_iters=step if declared is None else max(step, declared))
    folder = RunDirectory(Path(run.run_dir)).step(step - 1)
    with tempfile.TemporaryDirectory(prefix="megabatch-replay-") as scratch:
        # checkpoints of a run directory belong to the run, which may be alive
        elsewhere = replace(alone, run_dir=scratch)
        export = export_of(alone, source)
        checkpoints = assemble.make_checkpoints(elsewhere, ranks, source, export, tuning=engine.model.tuning)
        progress: Progress = start(alone, engine, checkpoints, source)
        if folder.is_dir():
            progress = checkpoints.restore(engine, folder)
    if progress.step != step - 1:
        raise CheckpointError(
            f"{folder} does not exist, and the run began at step {progress.step}: the update of step {step} cannot be "
            "repeated without what was before it"
        )
    return engine


def _as_shared(run: RunConfig, ranks: Ranks, completions: Sequence[Rolled]) -> Step:
    """The step in the micro-batches that the run's data-parallel ranks had, one rank's behind the other's: the
    balancing losses of experts, and bnpo, depend on them."""
    from megabatch.trainer.tasks.grpo import batching_of

    batching = batching_of(run, ranks)
    shares = [replace(batching.share, dp_rank=rank, dp_size=run.layout.dp) for rank in range(run.layout.dp)]
    steps = [replace(batching, share=share).step(completions, cursor={}, epoch=0.0) for share in shares]
    return replace(steps[0], packs=[pack for step in steps for pack in step.packs])


if __name__ == "__main__":
    status = int(main())
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of gloo must not hold up a process that is done
