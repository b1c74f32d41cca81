"""The token caches of a run, as run.json describes them. Without torch, so that they can be made on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.several_teachers import teacher_tags
from megabatch.data.cache import datasets
from megabatch.data.cache.datasets import CachePaths
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.counts import DataCounts, remember_counts
from megabatch.data.rows import sources
from megabatch.data.rows.mixing import Mixing
from megabatch.data.schedule import Schedule
from megabatch.data.stream import Stream
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError


def build_caches(run: RunConfig, tokenizer: Path, *, on_chunk: Callable[[], None] = lambda: None) -> CachePaths:
    """Builds the token caches of training and validation data unless they exist; one process calls it.

    Args: `tokenizer`: its folder; `on_chunk`: called after every hundred or so tokenised rows.
    Raises: DataError naming file and line.
    """
    recipe, data = run.recipe, run.recipe.data
    return datasets.build(
        encoding_of(run, tokenizer),
        vocab_size=run.shape.vocab_size,
        dataset=data.dataset,
        val_dataset=data.val_dataset,
        cache_dir=cache_folder(run),
        seed=recipe.training.seed,
        dataset_shuffle=data.dataset_shuffle,
        dataset_num_proc=data.dataset_num_proc,
        use_hf=recipe.bridge.use_hf,
        mixing=_mixing(run),
        on_chunk=on_chunk,
    )


def encoding_of(run: RunConfig, tokenizer: Path) -> Encoding:
    """The settings that decide the tokens of this run's samples. Args: `tokenizer`: its folder."""
    recipe, data = run.recipe, run.recipe.data
    return Encoding(
        tokenizer=tokenizer,
        rows=run.task.rows,
        template=data.template,
        template_variables=data.template_variables,
        system=data.system,
        columns=data.columns,
        preprocess=data.preprocess,
        preprocess_timeout_s=data.preprocess_timeout_s,
        max_length=data.max_length,
        truncation_strategy=resolved(data.truncation_strategy),
        loss_scale=resolved(data.loss_scale),
        problem_type=recipe.training.problem_type,
        num_labels=recipe.training.num_labels,
        teachers=_teachers(run),
        teacher_tag_key=recipe.gkd.teacher_tag_key if run.task.name == "gkd" else "",
        channels=recipe.training.enable_channel_loss,
        instruction=recipe.reranker.generative_reranker_instruction if run.task.rows == "yes_no" else "",
        step_separator=recipe.prm.step_separator if run.task.rows == "steps" else "",
        mismatches=run.task.name == "kto" and recipe.kto.uses_kl,
        ref_log_probs=run.task.name == "dpo" and recipe.rlhf.precompute_ref_log_probs,
        sanitize_control_tokens=data.sanitize_control_tokens,
        new_special_tokens=tuple(recipe.model.new_special_tokens),
    )


def _teachers(run: RunConfig) -> tuple[tuple[str, int], ...]:
    """Tags of rows, with the numbers of their teachers."""
    if run.task.name != "gkd":
        return ()
    group = run.recipe.gkd
    return tuple(teacher_tags(server=group.teacher_model_server, model=group.teacher_model))


def build_validation(run: RunConfig, tokenizer: Path, *, on_chunk: Callable[[], None] = lambda: None) -> Path | None:
    """Builds only the token cache of the validation data, for a run that streams its training data."""
    if not (validation := run.recipe.data.val_dataset):
        return None
    alone = replace(run.recipe.data, dataset=validation, val_dataset=(), interleave_prob=None)
    recipe = replace(run.recipe, data=alone)
    return build_caches(replace(run, recipe=recipe), tokenizer, on_chunk=on_chunk).train


def stream_of(run: RunConfig, tokenizer: Path) -> Stream:
    """The run's training data as a stream. Raises: DataError for a path that does not exist."""
    recipe, data = run.recipe, run.recipe.data
    return Stream(
        sources=sources.resolve(data.dataset, use_hf=recipe.bridge.use_hf),
        encoding=encoding_of(run, tokenizer),
        vocab_size=run.shape.vocab_size,
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.training.seed,
        shuffle=data.dataset_shuffle,
        shuffle_epochs=data.train_dataloader_shuffle,
        block_rows=data.shuffle_buffer_size,
        mixing=_mixing(run),
        packing_length=data.packing_length,
        shares_prompts=resolved(recipe.rlhf.share_prompts),
        num_proc=data.dataset_num_proc,
    )


def _mixing(run: RunConfig) -> Mixing | None:
    data = run.recipe.data
    return None if data.interleave_prob is None else Mixing(tuple(data.interleave_prob), data.stopping_strategy)


def cache_folder(run: RunConfig) -> Path:
    """The folder of the token caches."""
    return Path(os.environ.get("MEGABATCH_CACHE") or Path(run.run_dir) / "cache")


def note_data(run: RunConfig, data: TokenCache, schedule: Schedule) -> None:
    """Saves how much training data there is, for later plans of the same run; one process calls it."""
    tokens = int(data.lengths.sum())
    found = DataCounts(samples=len(data), items=len(schedule), tokens=tokens, cache=str(data.path))
    remember_counts(run, cache_folder(run), found)


def open_caches(run: RunConfig, paths: CachePaths) -> tuple[TokenCache, TokenCache | None]:
    """(training, validation) samples. Raises: DataError for a damaged cache or an empty split."""
    data, seed = run.recipe.data, run.recipe.training.seed
    made = data.preprocess is not None
    return datasets.open_caches(paths, split_dataset_ratio=data.split_dataset_ratio, seed=seed, whole_rows=made)


def schedule_of(run: RunConfig, data: TokenCache, *, shuffle: bool = True) -> Schedule:
    """The order in which the run draws samples. Raises: DataError for an item longer than a pack."""
    recipe = run.recipe
    again = shuffle and recipe.data.train_dataloader_shuffle and recipe.data.dataloader_type == "cyclic"
    return Schedule(
        data.lengths,
        items=data.items,
        shared=data.shared(np.arange(len(data))) if resolved(recipe.rlhf.share_prompts) else None,
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.training.seed,
        dataset_shuffle=shuffle and recipe.data.dataset_shuffle,
        train_dataloader_shuffle=again,
        packing_length=recipe.data.packing_length,
        group_by_length=shuffle and recipe.data.group_by_length,
        content=data.content,
    )


def train_iters(run: RunConfig, schedule: Schedule) -> int:
    """Number of steps of the run. Raises: DataError for more than one pass over data that may be drawn only once."""
    training = run.recipe.training
    steps = training.train_iters or schedule.train_iters(resolved(training.max_epochs))
    if run.recipe.data.dataloader_type == "single" and steps * schedule.global_batch_size > len(schedule):
        raise DataError(
            f"data.dataloader_type='single' draws the {len(schedule):,} {schedule.drawn} of the training data once, "
            f"which are {len(schedule) // schedule.global_batch_size} steps, and training.train_iters={steps}; lower "
            "it, or set dataloader_type='cyclic'"
        )
    return steps


def course(schedule: Schedule, data: TokenCache, train_iters: int) -> str:
    """What an epoch and `train_iters` steps draw, in words."""
    count, drawn = len(schedule), train_iters * schedule.global_batch_size
    within = f" in {count:,} {schedule.drawn}" if count != len(data) else ""
    epoch = f"an epoch draws all {len(data):,} samples{within}, {int(data.lengths.sum()):,} tokens"
    early = f"{-drawn % count:,} {schedule.drawn} early"
    end = f"; the last epoch ends {early}" if drawn % count else ""
    return f"{epoch}; the run draws {drawn / count:.2f} epochs{end}"
