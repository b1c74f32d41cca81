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


def adapter_fault(folder: Path) -> str | None:
    """Why a folder with an adapter cannot be read as a model: transformers reads it with its adapter; else None."""
    if not _is_adapter(folder):
        return None
    merge = f"megabatch-convert --merge_lora --adapters {folder}"
    if not (folder / "config.json").is_file():
        return (
            f"{folder} is an adapter, not a model; name the folder that `{merge} --to_hf --output_dir MERGED` writes, "
            "or, of a policy or its reference, the base here and the adapter in bridge.adapters or bridge.ref_adapters"
        )
    if any(folder.glob("adapter_model.*")):
        return (
            f"{folder} holds an adapter beside a model, which transformers applies when it reads the folder; name the "
            f"folder that `{merge} --model {folder} --to_hf --output_dir MERGED` writes, or move adapter_* elsewhere "
            "to take the model without it"
        )
    return None


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
        if wanted is Kind.MODEL and folder is not None and folder not in adapters and (fault := adapter_fault(folder)):
            raise ConversionError(f"{flag} {fault}")
