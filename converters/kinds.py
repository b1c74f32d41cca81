"""What a folder is, where it is named by the flag of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from megabatch.converters.safetensors_io.folder import has_safetensors
from megabatch.converters.torch_dist.find import find_checkpoint
from megabatch.errors import ConversionError


class Kind(Enum):
    """What there is in a folder, and the flags that take it."""

    MODEL = ("the folder of a Hugging Face model", "--model")
    CHECKPOINT = ("a checkpoint of megatron-core", "--mcore_model, with --to_hf")
    ADAPTER = ("an adapter", "--adapters")


def kind_of(folder: Path) -> Kind | None:
    """None where it is nothing that is known, or not there."""
    if not folder.is_dir():
        return None
    if (folder / "adapter_config.json").is_file() and not has_safetensors(folder):
        return Kind.ADAPTER
    if (folder / "config.json").is_file() and (has_safetensors(folder) or any(folder.glob("pytorch_model*.bin"))):
        return Kind.MODEL
    try:
        find_checkpoint(folder)
    except ConversionError:
        return None
    return Kind.CHECKPOINT


def check_kinds(*, model: Path | None, mcore_model: Path | None, adapters: Sequence[Path]) -> None:
    """Args: model: None where its config.json alone is needed, which lies beside checkpoints too.
    Raises: ConversionError for a folder that is of another kind than its flag takes, naming the right one.
    """
    given = [("--model", Kind.MODEL, model), ("--mcore_model", Kind.CHECKPOINT, mcore_model)]
    given += [("--adapters", Kind.ADAPTER, adapter) for adapter in adapters]
    for flag, wanted, folder in given:
        found = None if folder is None else kind_of(folder)
        as_adapter = wanted is Kind.ADAPTER and found is Kind.CHECKPOINT
        if found is not None and found is not wanted and not as_adapter:
            raise ConversionError(
                f"{flag} {folder}: is {found.value[0]}, not {wanted.value[0]}; name it as {found.value[1]}"
            )
