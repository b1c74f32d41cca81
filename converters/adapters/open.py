"""Opens adapters of either format against the table of their base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabatch.converters.adapters.adapter import Adapter, Tables
from megabatch.converters.adapters.config import NAME, AdapterConfig, read_config
from megabatch.converters.adapters.mcore_folder import find_config, open_mcore
from megabatch.converters.adapters.peft_folder import is_peft, open_peft
from megabatch.converters.engine.plan import Numbered
from megabatch.converters.hf_model import find_folder
from megabatch.converters.request import Path_
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.did_you_mean import did_you_mean
from megabatch.errors import ConversionError


def open_adapters(
    paths: Sequence[Path_], tables: Tables, numbered: Numbered, *, accept_bin: bool = False
) -> list[Adapter]:
    """Opens them one by one. Raises: ConversionError for anything that does not fit the base model."""
    return [
        open_peft(path, tables, numbered, accept_bin=accept_bin)
        if is_peft(path)
        else open_mcore(path, tables, numbered)
        for path in map(_existing, paths)
    ]


def _existing(given: Path_) -> Path:
    path = Path(given)
    if not path.is_dir():
        raise ConversionError(f"{path}: no such folder of an adapter{did_you_mean(path)}")
    if (path / NAME).is_file() and not is_peft(path) and not any(path.rglob(".metadata")):
        raise ConversionError(f"{path}: has {NAME} and no adapter_model.safetensors; complete the download")
    require_one(path)
    return path


def require_one(folder: Path) -> None:
    """Raises: ConversionError for a folder without an adapter that has some in folders of its own, as peft saves all
    but the one called `default`."""
    if is_peft(folder) or not folder.is_dir():
        return
    inner = sorted(child.name for child in folder.iterdir() if is_peft(child))
    if inner and not any(folder.rglob(".metadata")):  # a checkpoint of ours may have one as `hf/`
        raise ConversionError(f"{folder}: holds adapters in folders of their own; name one: {', '.join(inner[:8])}")


def base_model_of(path: Path_) -> Path:
    """The folder of the base model's config.json: next to a checkpoint of ours, or named by adapter_config.json.

    Raises: ConversionError when there is none.
    """
    folder = _existing(path)
    if is_peft(folder):
        config = read_config(folder / NAME)
        places = [_named(config)]
    else:
        config = read_config(find_config(folder, find_torch_dist(folder)))
        places = [config.path.parent, _named(config)]
    for place in places:
        if place is not None and (place / "config.json").is_file():
            return place
    raise ConversionError(
        f"{folder}: the base model's config.json is needed to know its layers; name its folder as --model"
    )


def base_weights_of(adapters: Sequence[Path_]) -> Path:
    """The folder of the base model that adapters name, which they are merged into.

    Raises: ConversionError when an adapter names no base model or a missing one, or they name different ones.
    """
    folders: dict[Path, str] = {}
    for path in adapters:
        folder = _existing(path)
        given = folder if is_peft(folder) else find_torch_dist(folder)
        config = read_config(folder / NAME if is_peft(folder) else find_config(folder, given))
        name = config.values.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise ConversionError(f"{config.path}: names no base_model_name_or_path to merge into; give it as --model")
        try:
            folders.setdefault(find_folder(name, revision=_revision(config)).resolve(), name)
        except ConversionError as error:
            raise ConversionError(f"{config.path}: base_model_name_or_path: {error}; or give it as --model") from error
    if len(folders) > 1:
        raise ConversionError(f"the adapters were trained on {' and '.join(folders.values())}; give one as --model")
    return next(iter(folders))


def _named(config: AdapterConfig) -> Path | None:
    """The base model by its name in training: a folder, or a model in a hub's cache."""
    name = config.values.get("base_model_name_or_path")
    try:
        return find_folder(name, revision=_revision(config)) if isinstance(name, str) and name else None
    except ConversionError:
        return None


def _revision(config: AdapterConfig) -> str | None:
    """Of the base model on a hub, where the adapter names one."""
    revision = config.values.get("revision")
    return revision if isinstance(revision, str) and revision else None
