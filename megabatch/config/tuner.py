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
    """Trains the model's own parameters (full), or adapters added to them (lora)."""
    freeze_llm: bool = param(False, built=False)
    """Freezes a multimodal model's language part."""
    freeze_vit: bool = param(True, built=False)
    """Freezes a multimodal model's vision and audio towers."""
    freeze_aligner: bool = param(True, built=False)
    """Freezes a multimodal model's aligner."""
    freeze_parameters: Sequence[str] = param((), built=False)
    """Prefixes of parameters to freeze."""
    freeze_parameters_regex: str | None = param(None, built=False)
    """Pattern of parameters to freeze."""
    freeze_parameters_ratio: float = param(0.0, built=False, at_least=0, at_most=1)
    """Fraction of the parameters to freeze, starting at the input; with pipeline stages only 0 or 1."""
    trainable_parameters: Sequence[str] = param((), built=False)
    """Prefixes of parameters to train although frozen above."""
    trainable_parameters_regex: str | None = param(None, built=False)
    """Pattern of parameters to train although frozen above."""
    adapter_load: str | None = param(None, built=False)
    """Folder of an adapter in megatron-core format to resume from."""
    target_modules: Sequence[str] = param(("all-linear",), built=False)
    """Suffixes of the modules that get LoRA; `all-linear` and `all-router` mean all of that kind."""
    target_regex: str | None = param(None, built=False)
    """Pattern of modules that get LoRA, instead of `target_modules`."""
    modules_to_save: Sequence[str] = param((), built=False)
    """Modules to train and save in full in addition to LoRA, such as `word_embeddings` and `output_layer`."""
    lora_rank: int = param(8, built=False, at_least=1)
    """Rank of an adapter."""
    lora_alpha: float = param(32, built=False, above=0)
    """An adapter's output is multiplied by this divided by its rank."""
    lora_dropout: float = param(0.05, built=False, at_least=0, below=1)
    """Probability of dropping an element of an adapter's input."""
    lora_bias: Literal["none", "all"] = param("none", built=False)
    """Whether biases are trained."""
    use_rslora: bool = param(False, built=False)
    """Divides by the square root of the rank instead of the rank."""

    def __post_init__(self) -> None:
        freeze_lists(self)
