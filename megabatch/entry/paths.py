"""Where a run lives, and its recipe with every path made absolute: the ranks start in another folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from megabatch.config.recipe import Recipe
from megabatch.config.run import save_folder
from megabatch.config.several_teachers import each_model
from megabatch.config.user_code import with_user_code
from megabatch.data.rows.names import parse
from megabatch.data.tokens.new_tokens import listed
from megabatch.errors import ConfigError, DataError, Fault

_Path = str | os.PathLike[str]
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

NUMBERED = re.compile(r"v(\d+)-.*")
"""Names of run directories below `save`."""


def run_directory(recipe: Recipe, *, given: str | None) -> Path:
    """`--run_dir`, else `save/v<number>-<time>`, or `save` itself without `add_version`; nothing is created.

    Raises: ConfigError for a name with control characters.
    """
    if given:
        return _one_line("--run_dir", Path(given).expanduser().absolute())
    save = _one_line("checkpoint.save", save_folder(recipe).expanduser().absolute())
    return save / _version(save) if recipe.checkpoint.add_version else save


def _one_line(field: str, folder: Path) -> Path:
    if _CONTROL.search(str(folder)):
        rule = "holds a control character, such as a line end, which no job script can name; choose another folder"
        raise ConfigError([Fault(field, str(folder), rule)])
    return folder


def code_store(recipe: Recipe, *, given: str | None) -> Path:
    """Folder of code snapshots, which all runs below one `save` share."""
    return (
        run_directory(recipe, given=given) / "code" if given else save_folder(recipe).expanduser().absolute() / "code"
    )


def _version(save: Path) -> str:
    """The next number after the highest existing one, and the time to the second."""
    taken = [int(match[1]) for path in save.glob("v*") if (match := NUMBERED.fullmatch(path.name))]
    return f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with each local path made absolute; hub names stay."""
    model, checkpoint, logging = recipe.model, recipe.checkpoint, recipe.logging
    own = with_user_code(recipe, absolute)
    return replace(
        own,
        model=replace(
            model,
            model=absolute_model(model.model),
            tokenizer=absolute_model(model.tokenizer),
            new_special_tokens=_tokens(model.new_special_tokens),
        ),
        data=replace(
            own.data,
            dataset=_datasets(recipe, recipe.data.dataset),
            val_dataset=_datasets(recipe, recipe.data.val_dataset),
        ),
        checkpoint=replace(
            checkpoint,
            save=str(save_folder(recipe).expanduser().absolute()),
            load=absolute(checkpoint.load),
        ),
        logging=replace(
            logging,
            tensorboard_dir=absolute(logging.tensorboard_dir),
            wandb_save_dir=absolute(logging.wandb_save_dir),
        ),
        bridge=replace(
            recipe.bridge,
            ref_model=absolute_model(recipe.bridge.ref_model),
            adapters=tuple(absolute(folder) for folder in recipe.bridge.adapters),
            ref_adapters=tuple(absolute(folder) for folder in recipe.bridge.ref_adapters),
        ),
        rlhf=replace(
            recipe.rlhf,
            ref_load=absolute(recipe.rlhf.ref_load),
            ref_adapter_load=absolute(recipe.rlhf.ref_adapter_load),
        ),
        grpo=replace(own.grpo, reward_model=tuple(absolute_model(name) or "" for name in own.grpo.reward_model)),
        gkd=replace(own.gkd, teacher_model=_absolute_teachers(own.gkd.teacher_model)),
        tuner=replace(recipe.tuner, adapter_load=absolute(recipe.tuner.adapter_load)),
    )


def _tokens(given: Sequence[str]) -> tuple[str, ...]:
    """The tokens in place of the files that list them: a run keeps its tokens though a file changes."""
    try:
        return listed(given)
    except DataError:
        return tuple(given)  # `find_model` reports the fault


def _datasets(recipe: Recipe, datasets: Sequence[str]) -> tuple[str, ...]:
    return tuple(_dataset(text, use_hf=recipe.bridge.use_hf) for text in datasets)


def _dataset(text: str, *, use_hf: bool) -> str:
    try:
        return parse(text, use_hf=use_hf).absolute()
    except DataError:
        return text  # preflight reports the fault


def _absolute_teachers(named: str | None) -> str | None:
    return None if named is None else each_model(named, lambda name: absolute_model(name) or "")


def absolute_model(name: _Path | None) -> str | None:
    """Makes a model or tokenizer absolute if it is a local folder or spelled like a path; hub names stay."""
    if name is None:
        return None
    path = Path(name).expanduser()
    return absolute(name) if path.is_dir() or str(name).startswith(("/", "./", "../", "~")) else str(name)


@overload
def absolute(path: _Path) -> str: ...
@overload
def absolute(path: None) -> None: ...
def absolute(path: _Path | None) -> str | None:
    """Relative to the launcher's current folder."""
    return None if path is None else str(Path(path).expanduser().absolute())
