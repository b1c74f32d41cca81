"""Recognises the kind of a folder that was given to the wrong flag."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from megabatch.converters.safetensors_io.folder import has_safetensors
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.errors import ConversionError


class Kind(Enum):
    """The kind of a folder's content, and the flags that take it."""

    MODEL = ("the folder of a Hugging Face model", "--model")
    CHECKPOINT = ("a checkpoint of megatron-core", "--mcore_model, with --to_hf")
    ADAPTER = ("an adapter", "--adapters")


def kinds_of(folder: Path) -> list[Kind]:
    """All kinds that a folder matches; none for an unknown or missing folder."""
    if not folder.is_dir():
        return []
    tests = ((Kind.ADAPTER, _is_adapter), (Kind.MODEL, _is_model), (Kind.CHECKPOINT, _is_checkpoint))
    return [kind for kind, test in tests if test(folder)]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_model(folder: Path) -> bool:
    weights = has_safetensors(folder) or any(folder.glob("pytorch_model*.bin"))
    return weights and (folder / "config.json").is_file()


def _is_checkpoint(folder: Path) -> bool:
    try:
        find_torch_dist(folder)
    except ConversionError:
        return False
    return True


def check_kinds(*, model: Path | None, mcore_model: Path | None, adapters: Sequence[Path]) -> None:
    """Args: model: None where its config.json alone is needed, which lies beside checkpoints too.
    Raises: ConversionError for a folder of another kind than its flag takes; it names the right flag.
    """
    given = [("--model", Kind.MODEL, model), ("--mcore_model", Kind.CHECKPOINT, mcore_model)]
    given += [("--adapters", Kind.ADAPTER, adapter) for adapter in adapters]
    for flag, wanted, folder in given:
        found = [] if folder is None else kinds_of(folder)
        as_adapter = wanted is Kind.ADAPTER and Kind.CHECKPOINT in found
        if found and wanted not in found and not as_adapter:
            what, right = found[0].value
            raise ConversionError(f"{flag} {folder}: is {what}, not {wanted.value[0]}; name it as {right}")
