"""Which parameters are trained: all, some of them, or LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import freeze_lists, param


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuner:
    """Full-parameter training with frozen parts, or LoRA."""

    tuner_type: Literal["full", "lora"] = param("full", built=("full",), aliases=("train_type",))
    """Trains the model's own parameters, or adapters beside them."""
    freeze_llm: bool = param(False, built=False)
    """Leaves a multimodal model's language part untrained."""
    freeze_vit: bool = param(True, built=False)
    """Leaves a multimodal model's vision and audio towers untrained."""
    freeze_aligner: bool = param(True, built=False)
    """Leaves a multimodal model's aligner untrained."""
    freeze_parameters: Sequence[str] = param((), built=False)
    """Prefixes of parameters that are not trained."""
    freeze_parameters_regex: str | None = param(None, built=False)
    """Pattern of parameters that are not trained."""
    freeze_parameters_ratio: float = param(0.0, built=False, at_least=0, at_most=1)
    """Part of the parameters, from the input upwards, that is not trained; with pipeline stages only 0 or 1."""
    trainable_parameters: Sequence[str] = param((), built=False)
    """Prefixes of parameters that are trained although frozen above."""
    trainable_parameters_regex: str | None = param(None, built=False)
    """Pattern of parameters that are trained although frozen above."""
    adapter_load: str | None = param(None, built=False)
    """Folder of an adapter in megatron-core format to resume from."""
    target_modules: Sequence[str] = param(("all-linear",), built=False)
    """Ends of the names of modules that get LoRA; `all-linear` and `all-router` stand for all of their kind."""
    target_regex: str | None = param(None, built=False)
    """Pattern of modules that get LoRA, instead of `target_modules`."""
    modules_to_save: Sequence[str] = param((), built=False)
    """Modules trained and saved in full beside LoRA, such as `word_embeddings` and `output_layer`."""
    lora_rank: int = param(8, built=False, at_least=1)
    """Rank of an adapter."""
    lora_alpha: float = param(32, built=False, above=0)
    """An adapter's output is scaled by this over its rank."""
    lora_dropout: float = param(0.05, built=False, at_least=0, below=1)
    """Probability of dropping an element of an adapter's input."""
    lora_bias: Literal["none", "all"] = param("none", built=False)
    """Whether biases are trained."""
    use_rslora: bool = param(False, built=False)
    """Scales by the square root of the rank instead of the rank."""

    def __post_init__(self) -> None:
        freeze_lists(self)
