"""The prompts of a run: their tokens on every rank, their rows on the main one, and the order they are drawn in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megabatch.config.data import Data
from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows import sources
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.preprocess import preprocess_of
from megabatch.data.rows.prompts import Asked, ColumnNames, prompt_of
from megabatch.data.run_caches import encoding_of
from megabatch.data.schedule import Cursor, Schedule
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt that was drawn."""

    index: int
    """In the data."""
    ids: tuple[int, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Prompts:
    """One dataset's prompts."""

    data: TokenCache
    rows: dict[Origin, Row]
    """Empty on ranks other than the main one."""
    run: RunConfig
    columns: tuple[str, ...] = ()
    """All names that rows of the run have besides what makes the prompt; on the main rank."""

    def __len__(self) -> int:
        return len(self.data)

    def at(self, index: int) -> Prompt:
        return Prompt(index, tuple(self.data[index].ids.tolist()), str(self.data.origin(index)))

    def asked(self, index: int) -> Asked:
        """The prompt's turns and columns, None for those that other rows have; on the main rank."""
        data = self.run.recipe.data
        found = prompt_of(self.rows[self.data.origin(index)], columns=data.columns, system=data.system)
        absent = dict.fromkeys(name for name in self.columns if name not in found.for_rewards)
        return replace(found, columns={**absent, **found.columns})

    def schedule(self, each: int) -> Schedule:
        """The order in which the run draws its prompts, `each` at a time."""
        recipe = self.run.recipe
        return Schedule(
            self.data.lengths,
            global_batch_size=each,
            seed=recipe.training.seed,
            dataset_shuffle=recipe.data.dataset_shuffle,
            train_dataloader_shuffle=recipe.data.train_dataloader_shuffle and recipe.data.dataloader_type == "cyclic",
            content=self.data.content,
        )

    def draw(self, schedule: Schedule, cursor: Cursor) -> tuple[list[Prompt], Cursor]:
        packs, after = schedule.next(cursor)
        return [self.at(int(schedule.samples(int(pack))[0])) for pack in packs], after


@dataclass(frozen=True, slots=True)
class Language:
    """What ends a completion, and what turns its tokens into text."""

    stop_ids: tuple[int, ...]
    tokenizer: Any
    """None on ranks other than the main one, as the template."""
    template: Template | None

    def text(self, ids: Sequence[int]) -> str:
        """Without special tokens; on the main rank."""
        found: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return found


def open_prompts(
    run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]
) -> tuple[Prompts, Prompts | None]:
    """(training, validation); collective. Raises: DataError on every rank."""
    tokens = open_tokens(run, source, ranks, busy=busy)
    data = run.recipe.data
    rows: dict[Origin, Row] = {}
    ranks.on_main(lambda: rows.update(rows_of(run, [*data.dataset, *data.val_dataset])))
    columns = _columns_of(rows.values(), data)
    validation = None if tokens.validation is None else Prompts(tokens.validation, rows, run, columns)
    return Prompts(tokens.train, rows, run, columns), validation


def _columns_of(rows: Iterable[Row], data: Data) -> tuple[str, ...]:
    """What `Prompts.columns` are."""
    names = ColumnNames()
    for row in rows:
        names.add(row, columns=data.columns, system=data.system)
    return tuple(sorted(names.found))


def rows_of(run: RunConfig, datasets: Sequence[str]) -> dict[Origin, Row]:
    """What prompts were made of, by place, as `data.preprocess` left it. Raises: DataError."""
    recipe = run.recipe
    preprocess = preprocess_of(recipe.data) or (lambda row: [row])
    return {
        made.origin: made
        for source in sources.resolve(datasets, use_hf=recipe.bridge.use_hf)
        for row in source.rows(seed=recipe.training.seed, shuffle=recipe.data.dataset_shuffle)
        for made in _at_most_one(preprocess(row), row.origin)
    }


def _at_most_one(made: list[Row], origin: Origin) -> list[Row]:
    """Rewards get the columns of a prompt's row, which is found by its place."""
    if len(made) > 1:
        raise DataError(
            f"{origin}: data.preprocess made {len(made)} rows of it; with rlhf_type='grpo' it may make one, since "
            "rewards read the columns of a prompt by its place in the file; split the rows beforehand"
        )
    return made


def open_language(run: RunConfig, source: ModelSource, ranks: Ranks) -> Language:
    """Collective. Raises: DataError on every rank."""
    loaded: list[Template] = []

    def stops() -> tuple[int, ...]:
        tokenizer = tokenizers.load(source.tokenizer)
        loaded.append(template_of(tokenizer, encoding_of(run, source.tokenizer)))
        return stop_ids_of(tokenizer, loaded[0].turn_end(), source.config_folder)

    stop_ids = ranks.on_main(stops)
    return Language(stop_ids, loaded[0].tokenizer if loaded else None, loaded[0] if loaded else None)


def stop_ids_of(tokenizer: Any, turn_end: str | None, folder: Path) -> tuple[int, ...]:
    """What ends a completion: the end of a text, that of the assistant's turn in the chat template, and all that the
    model's folder declares, such as Llama's end of a message that calls a tool. Raises: DataError for broken JSON."""
    found = [tokenizer.eos_token_id, *declared_ends(folder)]
    if turn_end is not None:
        found.append(tokenizer.convert_tokens_to_ids(turn_end))
    return tuple(sorted({token for token in found if token is not None and 0 <= token < len(tokenizer)}))


def declared_ends(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, else of config.json, as transformers' `generate` reads it."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            declared = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as e:
            raise DataError(f"{path} is not valid JSON ({e}); copy it again") from e
        if declared is not None:
            return [declared] if isinstance(declared, int) else [one for one in declared if isinstance(one, int)]
    return []
