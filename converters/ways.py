"""The ways of converting, and what each heeds: an argument that would have no effect is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

from megabatch.errors import ConversionError


class Way(Enum):
    """What is made of what."""

    TO_MCORE = auto()
    TO_HF = auto()
    MERGED_TO_HF = auto()
    """A checkpoint of megatron-core with adapters merged into it."""
    REWRITE = auto()
    """A Hugging Face folder in another form."""
    RESHARD = auto()
    """A Hugging Face folder in other files, its tensors as they are."""
    ADAPTER_TO_MCORE = auto()
    ADAPTER_TO_PEFT = auto()


_ADAPTER = (Way.ADAPTER_TO_MCORE, Way.ADAPTER_TO_PEFT)
_WRITES_HF = (Way.TO_HF, Way.MERGED_TO_HF, Way.REWRITE)


class _Heeded(NamedTuple):
    """By which ways an argument is heeded, and what is said in the others: `{0}` begins the name of an argument, and
    `{1}` is the verb.
    """

    by: Collection[Way]
    otherwise: str


_OF_HF = "{1} about the Hugging Face folder that {0}to_hf writes of a model"
ARGUMENTS = {
    "to_mcore": _Heeded(tuple(Way), ""),
    "to_hf": _Heeded(tuple(Way), ""),
    "model": _Heeded(tuple(Way), ""),
    "mcore_model": _Heeded((Way.TO_HF, Way.MERGED_TO_HF), "{1} the checkpoint of a model that {0}to_hf converts"),
    "adapters": _Heeded((Way.TO_MCORE, Way.MERGED_TO_HF, Way.REWRITE, *_ADAPTER), ""),
    "merge_lora": _Heeded((Way.TO_MCORE, Way.MERGED_TO_HF, Way.REWRITE), "needs {0}adapters, the folders to merge"),
    "torch_dtype": _Heeded(
        (Way.TO_MCORE, *_WRITES_HF), "{1} about the weights of a model, and an adapter is converted as it is"
    ),
    "max_shard_size": _Heeded((*_WRITES_HF, Way.RESHARD), _OF_HF),
    "expert_layout": _Heeded(_WRITES_HF, _OF_HF),
    "fp8_quantise": _Heeded(_WRITES_HF, _OF_HF),
    "accept_bin": _Heeded(
        (Way.TO_MCORE, Way.MERGED_TO_HF, Way.REWRITE, *_ADAPTER),
        "{1} about weights that are read, and here those of {0}mcore_model are",
    ),
    "layer_keys": _Heeded((Way.TO_MCORE, Way.ADAPTER_TO_MCORE), "{1} about the checkpoint that {0}to_mcore writes"),
    "peft_format": _Heeded(
        (Way.ADAPTER_TO_PEFT,), "{1} about the adapter that {0}to_hf {0}adapters writes, converted and not merged"
    ),
}
"""Every argument that a plan depends on."""
_CHOICES = {
    "expert_layout": ("per_expert", "fused"),
    "peft_format": ("per_expert", "fused"),
    "layer_keys": ("stacked", "per_layer"),
}
_REWRITES = ("torch_dtype", "expert_layout", "fp8_quantise", "accept_bin", "merge_lora")


def way_of(arguments: Mapping[str, Any], *, prefix: str = "") -> Way:
    """The way that arguments ask for, by name; those that are None, False or empty are not given.

    Args: prefix: stands before the names of arguments in messages, where they are flags.
    Raises: ConversionError for what is missing, and naming every argument that would have no effect.
    """
    given = {
        name: value
        for name, value in arguments.items()
        if value is not None and value is not False and value not in ("", (), [])
    }
    way = _way(given, prefix)
    if faults := list(_faults(given, way, prefix)):
        raise ConversionError("; ".join(faults))
    return way


def _way(given: Mapping[str, Any], prefix: str) -> Way:
    if "to_mcore" in given and "to_hf" in given:
        raise ConversionError(f"{prefix}to_mcore and {prefix}to_hf exclude each other; give one of them")
    if "merge_lora" in given and "adapters" not in given:
        raise ConversionError(f"{prefix}merge_lora needs {prefix}adapters, the folders to merge")
    if "adapters" in given and "merge_lora" not in given:
        if len(given["adapters"]) > 1:
            raise ConversionError(
                f"{prefix}adapters: several adapters can be merged ({prefix}merge_lora); one at a time is converted"
            )
        return Way.ADAPTER_TO_MCORE if "to_mcore" in given else Way.ADAPTER_TO_PEFT
    if "to_mcore" in given:
        if "model" not in given and "merge_lora" not in given:
            raise ConversionError(f"{prefix}to_mcore needs {prefix}model, the Hugging Face folder to convert")
        return Way.TO_MCORE
    if "mcore_model" in given:
        return Way.MERGED_TO_HF if "adapters" in given else Way.TO_HF
    if "merge_lora" in given or ("model" in given and any(name in given for name in _REWRITES)):
        return Way.REWRITE
    if "model" in given and "max_shard_size" in given:
        return Way.RESHARD
    anew = ", ".join(prefix + name for name in (*_REWRITES, "max_shard_size"))
    raise ConversionError(
        f"{prefix}to_hf needs {prefix}mcore_model, the checkpoint to convert; or {prefix}model, a Hugging Face folder "
        f"to write anew, with one of {anew}"
    )


def _faults(given: Mapping[str, Any], way: Way, prefix: str) -> Iterator[str]:
    unheeded: dict[str, list[str]] = {}
    for name in given:
        if way not in ARGUMENTS[name].by:
            unheeded.setdefault(ARGUMENTS[name].otherwise, []).append(prefix + name)
    for otherwise, names in unheeded.items():
        yield ", ".join(names) + " " + otherwise.format(prefix, "is" if len(names) == 1 else "are")
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            yield f"{prefix}{name}={given[name]} must be {' or '.join(choices)}"
