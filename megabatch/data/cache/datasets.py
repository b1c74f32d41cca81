"""Training and validation data of a run: built by one process, opened by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.cache.vocabulary import require_known_ids
from megabatch.data.rows.mixing import Mixing
from megabatch.data.rows.sources import resolve
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class CachePaths:
    """Where the token caches are; broadcast by the process that built them."""

    train: Path
    validation: Path | None = None
    """None if validation data is split off the training data, or there is none."""


def build(
    encoding: Encoding,
    *,
    vocab_size: int,
    dataset: Sequence[str],
    val_dataset: Sequence[str] = (),
    cache_dir: Path,
    seed: int = 42,
    dataset_shuffle: bool = True,
    dataset_num_proc: int = 1,
    use_hf: bool = True,
    mixing: Mixing | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> CachePaths:
    """Builds the token caches of all datasets unless they exist; one process per shared file system calls it.

    Args: `vocab_size`: rows of the model's embedding; `mixing`: of the training data alone; `on_chunk`: called after
    every hundred or so tokenised rows.
    Raises: DataError naming file and line, also for a token that the model does not have.
    """
    if not dataset:
        raise DataError("data.dataset is not set; give at least one file, folder or hub name")

    def cache(datasets: Sequence[str], mixing: Mixing | None = None) -> Path:
        path = TokenCache.build(
            resolve(datasets, use_hf=use_hf),
            encoding,
            cache_dir=cache_dir,
            seed=seed,
            shuffle=dataset_shuffle,
            mixing=mixing,
            num_proc=dataset_num_proc,
            on_chunk=on_chunk,
        )
        require_known_ids(TokenCache.open(path), rows=vocab_size, folder=encoding.tokenizer)
        return path

    return CachePaths(cache(dataset, mixing), cache(val_dataset) if val_dataset else None)


def open_caches(
    paths: CachePaths, *, split_dataset_ratio: float = 0.0, seed: int = 42, whole_rows: bool = False
) -> tuple[TokenCache, TokenCache | None]:
    """(training, validation) samples; without a validation dataset, splits off a seeded part of the training data.

    Args: `whole_rows`: whether all that was made of a row stays on one side.
    Raises: DataError for a damaged cache, or a split that leaves either part empty.
    """
    train = TokenCache.open(paths.train)
    if paths.validation:
        return train, TokenCache.open(paths.validation)
    if not split_dataset_ratio:
        return train, None
    return train.split(split_dataset_ratio, seed=seed, whole_rows=whole_rows)
