"""One update of a GRPO run once more, on one process: from the ledger's completions and the checkpoint before it.

A program, started by `megabatch replay`: python -m megabatch.trainer.replay RUN_DIR --step N. It prints one JSON
object: the loss, the gradient norm and the other numbers of the update. It changes nothing in the run directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabatch.config.layout import layout_of
from megabatch.config.moe import MoE
from megabatch.config.optimization import undistributed
from megabatch.config.parallel import Parallel
from megabatch.config.run import RunConfig, derived
from megabatch.errors import CheckpointError, ConfigError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.history import MCORE
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
    print(json.dumps(numbers(result)))
    return ExitCode.DONE


def numbers(result: StepResult) -> dict[str, float | None]:
    """Its metrics as a run logs them, None where nothing was counted (a step without a loss), and `grad_norm`."""
    found = {name: ratio.value if ratio.count else None for name, ratio in result.metrics.items()}
    return found | {"grad_norm": result.grad_norm}


def in_one_process(run: RunConfig, *, gpus: int) -> RunConfig:
    """The same run without parallelism. Raises: ConfigError where that would be another computation."""
    recipe, layout = run.recipe, run.layout
    if (drawn := _dropout(run)) and (layout.world_size > layout.dp or layout.ep > 1):
        raise ConfigError(
            f"{', '.join(drawn)}: ranks that share a model or its rows drew random numbers for their own part of it, "
            "which one process cannot repeat; with dropout, only runs with data parallelism alone can be replayed"
        )
    if drawn and recipe.checkpoint.no_save_rng:
        raise ConfigError(
            f"{', '.join(drawn)}: checkpoint.no_save_rng=True left out the states of the random generators that the "
            "update drew from"
        )
    alone = replace(
        recipe,
        parallel=Parallel(
            distributed_backend="nccl" if gpus else "gloo",
            use_distributed_optimizer=False,
            distributed_timeout_minutes=recipe.parallel.distributed_timeout_minutes,
        ),
        optimizer=undistributed(recipe.optimizer),
        moe=_without_deepep(recipe.moe),
        resources=replace(recipe.resources, nodes=1, tasks_per_node=1, gpus_per_node=gpus),
    )
    one_rank = layout_of(alone, run.shape)
    assert one_rank is not None, "a batch divides by one rank"
    return replace(run, recipe=derived(alone, shape=run.shape, run_dir=Path(run.run_dir)), layout=one_rank)


def _without_deepep(moe: MoE) -> MoE:
    """DeepEP exchanges between two ranks or more; alltoall has its results."""
    if moe.moe_token_dispatcher_type != "flex":
        return moe
    return replace(moe, moe_token_dispatcher_type="alltoall", moe_enable_deepep=False)


def _dropout(run: RunConfig) -> list[str]:
    """The run's dropouts, as name=value."""
    model, tuner = run.recipe.model, run.recipe.tuner
    found = {
        "model.attention_dropout": model.attention_dropout,
        "model.hidden_dropout": model.hidden_dropout,
        "tuner.lora_dropout": tuner.lora_dropout if tuner.tuner_type == "lora" else 0.0,
    }
    return [f"{name}={value}" for name, value in found.items() if value]


def replayed(run: RunConfig, alone: RunConfig, step: int) -> StepResult:
    """Repeats the update. Args: `alone`: the run as it is repeated.

    Raises: RewardError for a step that the ledger lacks, CheckpointError without the state before it, ConfigError for
    a ledger without the experts that the step replayed.
    """
    if step > 1 and (drawn := _dropout(run)) and not RunDirectory(Path(run.run_dir)).step(step - 1).is_dir():
        raise CheckpointError(
            f"{', '.join(drawn)}: step {step} is the run's first, and no checkpoint has the states of the random "
            "generators that it drew from; with dropout, a later step can be replayed"
        )
    from megabatch.ledger.reader import Reader
    from megabatch.trainer.main import prepare_device

    prepare_device(alone)
    from megabatch.trainer import assemble
    from megabatch.trainer.rl.recorded import rolled
    from megabatch.trainer.tasks.grpo import objective_of

    completions = [rolled(record) for record in Reader(RunDirectory(Path(run.run_dir)).ledger).records(step)]
    mode = run.recipe.grpo.router_replay_mode
    if mode != "disabled" and any(one.routes is None for one in completions):
        raise ConfigError(f"grpo.router_replay_mode={mode!r}: an older release wrote the ledger, without the experts")
    with assemble.join_ranks(alone) as ranks:
        engine = _before(step, run, alone, ranks)
        batch = _as_shared(run, ranks, completions)
        with _each_drawing_as_before(run, engine, step, of_each=len(batch.packs) // run.layout.dp):
            return engine.step(batch.packs, objective_of(run), totals=batch.totals, filled=batch.filled)


@contextmanager
def _each_drawing_as_before(run: RunConfig, engine: Engine, step: int, *, of_each: int) -> Iterator[None]:
    """Inside this context the model draws random numbers as the run's data-parallel ranks did.

    Args: `of_each`: micro-batches of each rank; those of the first are computed first.
    """
    from megabatch.trainer.checkpoints import torch_dist
    from megabatch.trainer.checkpoints.progress import open_saved

    if not _dropout(run):
        yield
        return
    folder = RunDirectory(Path(run.run_dir)).step(step - 1)
    if folder.is_dir():
        manifest = open_saved(folder).manifest
        states = torch_dist.read_generators(engine.ranks, folder / MCORE, manifest, of=run.layout.dp)
    else:
        engine.ranks.seed(run.recipe.training.seed)
        states = [torch_dist.generators()] * run.layout.dp
    calls = itertools.count()

    def drawing(chunk: Any, arguments: Any) -> None:
        if chunk.training and (call := next(calls)) % of_each == 0:
            torch_dist.set_generators(states[call // of_each])

    hook = engine.model.wrapped[0].register_forward_pre_hook(drawing)
    try:
        yield
    finally:
        hook.remove()


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
