"""Puts the parts of a run together: ranks, data, engine, checkpoints, and the state that it starts from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.run_caches import build_caches, note_data, open_caches, schedule_of
from megabatch.data.schedule import Interleaving, Schedule
from megabatch.errors import CheckpointError
from megabatch.run_directory import RunDirectory
from megabatch.trainer.chat_export import ChatExport
from megabatch.trainer.checkpoints.checkpoints import Checkpoints, Retention
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.data.batches import Ahead, Batches, Share
from megabatch.trainer.data.pack import row_length_of
from megabatch.trainer.engine import Engine
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.hf_export import HfExport
from megabatch.trainer.model.build import build, ddp_config
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import prove_complete

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunData:
    """Samples and the order in which they are drawn."""

    train: TokenCache
    schedule: Schedule
    batches: Batches
    validation: Batches | None

    @property
    def mean_length(self) -> float:
        """Length of the sequence that a token is in, on average."""
        lengths: np.ndarray = self.train.lengths.astype(np.float64)
        return float(np.square(lengths).sum() / lengths.sum())


def join_ranks(run: RunConfig) -> Ranks:
    layout = run.layout
    return Ranks(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_size(run),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=run.recipe.parallel.distributed_timeout_minutes,
        seed=run.recipe.training.seed,
        gpus_per_node=run.recipe.resources.gpus_per_node,
    )


def virtual_size(run: RunConfig) -> int | None:
    """Chunks of each pipeline stage as megatron-core wants it: None without interleaving."""
    return run.layout.vp if run.layout.vp > 1 else None


def open_data(run: RunConfig, source: ModelSource, ranks: Ranks, heartbeat: Heartbeat) -> RunData:
    """Tokenises on one rank what no cache holds yet, and opens it on all; collective. Raises: DataError."""
    paths = ranks.on_main(lambda: build_caches(run, source.tokenizer, on_chunk=lambda: heartbeat.beat("starting")))
    train, validation = open_caches(run, paths)
    share, schedule = _share(run, ranks), schedule_of(run, train)
    schedule.require_a_batch()
    if ranks.rank == 0:
        note_data(run, train, schedule)
    data, evaluated = run.recipe.data, None
    ahead = Ahead(
        workers=data.num_workers,
        each=data.dataloader_prefetch_factor,
        pinned=data.dataloader_pin_memory and ranks.device.type == "cuda",
    )
    if validation is not None:
        evaluated = Batches(validation, schedule_of(run, validation, shuffle=False), share=share, ahead=ahead)
    return RunData(train, schedule, Batches(train, schedule, share=share, ahead=ahead), evaluated)


def _share(run: RunConfig, ranks: Ranks) -> Share:
    row_multiple = ranks.tp_size if run.recipe.parallel.sequence_parallel else 1
    return Share(
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        micro_batch_size=run.recipe.batch.micro_batch_size,
        interleaving=_interleaving(run),
        row_multiple=row_multiple,
        equal_rows=_equal_rows(run),
        row_length=row_length_of([_longest_row(run)], row_multiple, 1) if run.recipe.data.pad_to_max_length else 0,
        hidden_size=run.shape.hidden_size,
    )


def _interleaving(run: RunConfig) -> Interleaving:
    if run.layout.vp == 1:
        return Interleaving()
    stages = run.layout.pp
    return Interleaving(stages, run.recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage or stages)


def _longest_row(run: RunConfig) -> int:
    """Tokens of the longest micro-batch that the data can make."""
    data = run.recipe.data
    longest = data.packing_length if data.packing else data.max_length
    assert longest is not None, "a resolved run has its lengths"
    return longest * run.recipe.batch.micro_batch_size


def _equal_rows(run: RunConfig) -> int:
    """Neighbours over data parallelism that share experts, where rows or capacities are exchanged as equals.

    megatron-core lays experts over consecutive ranks of a pipeline stage, on which data parallelism comes last.
    """
    moe, layout = run.recipe.moe, run.layout
    if moe.moe_token_dispatcher_type == "allgather" or moe.moe_pad_expert_input_to_capacity:
        return max(1, layout.ep * layout.etp // (layout.tp * layout.cp))
    return 1


def build_engine(run: RunConfig, ranks: Ranks, *, train_iters: int) -> Engine:
    """The model with uninitialised weights, and its optimizer."""
    recipe, parallel = run.recipe, run.recipe.parallel
    config = transformer_config(recipe, run.shape, virtual_size=virtual_size(run))
    ddp = ddp_config(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    model = build(run.shape, config, ranks, ddp, vocab_size=recipe.model.padded_vocab_size)
    optimizer = Optimizer(
        model,
        group=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        train_iters=train_iters,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return Engine(model, ranks, optimizer=optimizer)


def make_checkpoints(run: RunConfig, ranks: Ranks, source: ModelSource) -> Checkpoints:
    group = run.recipe.checkpoint
    table = source.family.tensors(run.shape)
    chat = ChatExport(source.tokenizer, run.recipe.data.template, has_turns=run.recipe.task != "pt")
    export = HfExport(source.family, table, source.config_folder, group.max_shard_size, chat)
    return Checkpoints(
        RunDirectory(Path(run.run_dir)),
        ranks,
        run.layout,
        retention=Retention(
            no_save_optim=group.no_save_optim,
            no_save_rng=group.no_save_rng,
            save_retain_interval=group.save_retain_interval,
            save_total_limit=group.save_total_limit,
        ),
        table=table,
        export=export if group.save_safetensors else None,
    )


def start(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    """Loads this run's own newest checkpoint, else the one it was told to load, else the model as it came; collective.

    Returns: where the run goes on.
    """
    prove_complete(engine.model, checkpoints.table, engine.ranks)
    group = run.recipe.checkpoint
    if (resumed := checkpoints.resume(engine)) is not None:
        return resumed
    if group.load:
        found = engine.ranks.on_main(lambda: find_checkpoint(Path(group.load or ""), run))
        if found is not None:
            logger.info("loading %s", found)
            if group.finetune:
                checkpoints.restore_weights(engine, found)
                return Progress()
            return checkpoints.restore(engine, found, optimizer=not group.no_load_optim, rng=not group.no_load_rng)
    source.load(engine.model, engine.ranks)
    engine.optimizer_from_model()
    return Progress()


def find_checkpoint(path: Path, run: RunConfig) -> Path | None:
    """The folder that `checkpoint.load` means: a step's, a run's newest, or another tool's torch_dist folder.

    Raises: CheckpointError where nothing is found and `exit_on_missing_checkpoint` is set.
    """
    for folder in (path, path / "checkpoints"):
        for tracker, name in (("latest", "{}"), ("latest_checkpointed_iteration.txt", "iter_{:0>7}")):
            if (folder / tracker).is_file():
                newest = (folder / tracker).read_text(encoding="utf-8").strip()
                return folder / (newest if newest == "release" else name.format(newest))
    if (path / "trainer.json").is_file() or (path / ".metadata").is_file():
        return path
    if run.recipe.checkpoint.exit_on_missing_checkpoint:
        raise CheckpointError(
            f"checkpoint.load={str(path)!r} holds no checkpoint; give a run directory, step_* or torch_dist folder,"
            " or set exit_on_missing_checkpoint=False to start from the model"
        )
    return None
