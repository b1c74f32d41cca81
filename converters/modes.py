"""Which mode a request is for, and the errors for arguments that are missing or not used in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megabatch.converters.request import ConversionRequest, Mode, choices
from megabatch.errors import ConversionError

_REWRITES = ("torch_dtype", "expert_layout", "fp8_quantise", "accept_bin", "merge_lora")


def mode_of(request: ConversionRequest, *, prefix: str = "") -> Mode:
    """The mode of a request.

    Args: prefix: stands before the names of arguments in messages, where they are flags.
    Raises: ConversionError for missing arguments, and naming every argument that would have no effect.
    """
    given = request.given()
    mode = _mode(given, prefix)
    if faults := [*_unused(given, mode, prefix), *_unknown_choices(given, prefix)]:
        raise ConversionError("; ".join(faults))
    return mode


def _mode(given: Mapping[str, Any], prefix: str) -> Mode:
    if ("to_mcore" in given) == ("to_hf" in given):
        exclude = f"{prefix}to_mcore and {prefix}to_hf exclude each other; " if "to_hf" in given else ""
        raise ConversionError(f"{exclude}give one of {prefix}to_mcore and {prefix}to_hf")
    if "merge_lora" in given and "adapters" not in given:
        raise ConversionError(f"{prefix}merge_lora needs {prefix}adapters, the folders to merge")
    if "adapters" in given and "merge_lora" not in given:
        return _mode_of_adapter(given, prefix)
    if "to_mcore" in given:
        if "model" not in given and "merge_lora" not in given:
            raise ConversionError(f"{prefix}to_mcore needs {prefix}model, the Hugging Face folder to convert")
        return Mode.TO_MCORE
    return _mode_to_hf(given, prefix)


def _mode_of_adapter(given: Mapping[str, Any], prefix: str) -> Mode:
    if len(given["adapters"]) > 1:
        raise ConversionError(
            f"{prefix}adapters: several adapters can only be merged ({prefix}merge_lora); convert them one at a time"
        )
    return Mode.ADAPTER_TO_MCORE if "to_mcore" in given else Mode.ADAPTER_TO_PEFT


def _mode_to_hf(given: Mapping[str, Any], prefix: str) -> Mode:
    if "mcore_model" in given:
        return Mode.MERGED_TO_HF if "adapters" in given else Mode.TO_HF
    if "merge_lora" in given or ("model" in given and any(name in given for name in _REWRITES)):
        return Mode.REWRITE
    if "model" in given and "max_shard_size" in given:
        return Mode.RESHARD
    anew = ", ".join(prefix + name for name in (*_REWRITES, "max_shard_size"))
    raise ConversionError(
        f"{prefix}to_hf needs {prefix}mcore_model, the checkpoint to convert; or {prefix}model, a Hugging Face folder "
        f"to rewrite, with one of {anew}"
    )


def _unused(given: Mapping[str, Any], mode: Mode, prefix: str) -> Iterator[str]:
    """One error for all arguments that are not used for the same reason."""
    unused: dict[str, list[str]] = {}
    for argument in fields(ConversionRequest):
        if argument.name in given and mode not in argument.metadata["modes"]:
            unused.setdefault(argument.metadata["elsewhere"], []).append(prefix + argument.name)
    for elsewhere, names in unused.items():
        yield ", ".join(names) + " " + elsewhere.format(prefix, "is" if len(names) == 1 else "are")


def _unknown_choices(given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, words in choices().items():
        if name in given and given[name] not in words:
            yield f"{prefix}{name}={given[name]} must be {' or '.join(words)}"
