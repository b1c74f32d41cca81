"""The request of a conversion: flags, help, refusals and a chain's command line are derived from its fields."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import field, fields
from enum import Enum, auto
from typing import Any, get_args, get_type_hints

from megabatch.converters.mapping import ExpertLayout
from megabatch.converters.torch_dist.keys import LayerKeys
from megabatch.values import dataclass

Path_ = str | os.PathLike[str]


class Mode(Enum):
    """The kind of conversion."""

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


ADAPTER = (Mode.ADAPTER_TO_MCORE, Mode.ADAPTER_TO_PEFT)
_WRITES_HF = (Mode.TO_HF, Mode.MERGED_TO_HF, Mode.REWRITE)
_OF_HF = "{1} about the Hugging Face folder that {0}to_hf writes of a model"


def _use(help_: str, *, modes: Collection[Mode] = tuple(Mode), elsewhere: str = "") -> dict[str, Any]:
    """What an argument means and which modes use it.

    Args: elsewhere: the error in the other modes, behind its name: `{0}` begins the name of an argument, and `{1}` is
    the verb.
    """
    return {"help": help_, "modes": modes, "elsewhere": elsewhere}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRequest:
    """Everything that the plan of a conversion depends on; None, False or empty means not requested."""

    to_mcore: bool = field(default=False, metadata=_use("Hugging Face's format to megatron-core's"))
    to_hf: bool = field(default=False, metadata=_use("megatron-core's format to Hugging Face's"))
    model: Path_ | None = field(
        default=None,
        metadata=_use("Hugging Face folder or downloaded org/name: the source, or --to_hf takes its config"),
    )
    mcore_model: Path_ | None = field(
        default=None,
        metadata=_use(
            "checkpoint for --to_hf: of a run, a step, or of Megatron-LM or ms-swift",
            modes=(Mode.TO_HF, Mode.MERGED_TO_HF),
            elsewhere="{1} the checkpoint of a model that {0}to_hf converts",
        ),
    )
    adapters: Sequence[Path_] = field(
        default=(),
        metadata=_use("LoRA adapters in PEFT's or megatron-core's format: one to convert, or several to merge"),
    )
    merge_lora: bool = field(default=False, metadata=_use("add the adapters to the weights, in their order"))
    peft_format: ExpertLayout | None = field(
        default=None,
        metadata=_use(
            "layout of experts' adapters for --to_hf; transformers 5 has them fused",
            modes=(Mode.ADAPTER_TO_PEFT,),
            elsewhere="{1} about the adapter that {0}to_hf {0}adapters writes, converted and not merged",
        ),
    )
    torch_dtype: str | None = field(
        default=None,
        metadata=_use(
            "bfloat16, float16 or float32; default: unchanged",
            modes=(Mode.TO_MCORE, *_WRITES_HF),
            elsewhere="{1} about the weights of a model, and an adapter is converted as it is",
        ),
    )
    max_shard_size: str | int | None = field(
        default=None,
        metadata=_use(
            "largest safetensors file, default 5GB; with --model alone only that changes",
            modes=(*_WRITES_HF, Mode.RESHARD),
            elsewhere=_OF_HF,
        ),
    )
    expert_layout: ExpertLayout | None = field(
        default=None,
        metadata=_use(
            "layout of experts in the output; transformers 5 has them fused", modes=_WRITES_HF, elsewhere=_OF_HF
        ),
    )
    fp8_quantise: bool = field(
        default=False,
        metadata=_use(
            "write the weights of linear layers in block-scaled FP8, as DeepSeek-V3's",
            modes=_WRITES_HF,
            elsewhere=_OF_HF,
        ),
    )
    layer_keys: LayerKeys | None = field(
        default=None,
        metadata=_use(
            "how --to_mcore names layers; use per_layer if a run's --moe-layer-freq is a list",
            modes=(Mode.TO_MCORE, Mode.ADAPTER_TO_MCORE),
            elsewhere="{1} about the checkpoint that {0}to_mcore writes",
        ),
    )
    accept_bin: bool = field(
        default=False,
        metadata=_use(
            "read pickled weights if there are no safetensors, without running code in them",
            modes=(Mode.TO_MCORE, Mode.MERGED_TO_HF, Mode.REWRITE, *ADAPTER),
            elsewhere="{1} about weights that are read, and here those of {0}mcore_model are",
        ),
    )

    def given(self) -> dict[str, Any]:
        """The requested arguments, by name."""
        values = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        return {name: value for name, value in values.items() if _is_given(value)}


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", (), [])


def choices() -> dict[str, tuple[str, ...]]:
    """The values of the arguments that are a choice of some."""
    hints = get_type_hints(ConversionRequest).items()
    found = {name: tuple(word for kind in get_args(hint) for word in get_args(kind)) for name, hint in hints}
    return {name: words for name, words in found.items() if words and all(isinstance(word, str) for word in words)}
