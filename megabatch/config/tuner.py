"""Which parameters are trained: all, some of them, or LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuner:
    """Full-parameter training with frozen parts, or LoRA."""

    tuner_type: Literal["full", "lora"] = param("full", aliases=("train_type",))
    """Trains the model's own parameters (full), or adapters added to them (lora)."""
    freeze_llm: bool = param(False, built=False)
    """Freezes a multimodal model's language part."""
    freeze_vit: bool = param(True, built=False)
    """Freezes a multimodal model's vision and audio towers."""
    freeze_aligner: bool = param(True, built=False)
    """Freezes a multimodal model's aligner."""
    freeze_parameters: Sequence[str] = param(())
    """Prefixes of the names of parameters to freeze, megatron-core's (`decoder.layers.0.`) or Hugging Face's
    (`model.layers.0.`)."""
    freeze_parameters_regex: str | None = param(None)
    """Regular expression to find in the names of parameters to freeze."""
    freeze_parameters_ratio: float = param(0.0, at_least=0, at_most=1)
    """Fraction of the parameters to freeze, starting at the input."""
    trainable_parameters: Sequence[str] = param(())
    """Prefixes of parameters to train although frozen above."""
    trainable_parameters_regex: str | None = param(None)
    """Regular expression to find in the names of parameters to train although frozen above."""
    adapter_load: str | None = param(None, aliases=("mcore_adapter",))
    """Run or checkpoint with an adapter to go on from, exactly unless `finetune`; of one that was converted, or that
    another program saved, the adapter alone."""
    target_modules: Sequence[str] = param(("all-linear",))
    """Layers that get an adapter, by the ends of their names, megatron-core's (`linear_qkv`) or Hugging Face's
    (`q_proj`); `all-linear`, `all-router` and `all-embedding` mean all of that kind."""
    target_regex: str | None = param(None)
    """Regular expression for the whole name of a layer that gets an adapter, in place of `target_modules`."""
    modules_to_save: Sequence[str] = param(())
    """Modules to train and save in full in addition to LoRA, such as `word_embeddings` and `output_layer`."""
    lora_rank: int = param(8, at_least=1)
    """Rank of an adapter."""
    lora_alpha: float = param(32, above=0)
    """An adapter's output is multiplied by this divided by its rank."""
    lora_dropout: float = param(0.05, at_least=0, below=1)
    """Probability of dropping an element of an adapter's input; not of routers' and embeddings'."""
    lora_dtype: Literal["float32", "bfloat16", "float16"] | None = param(None)
    """Number type of adapters, the model's; None means the same. The optimizer keeps an fp32 copy of adapters either
    way, unless the model is in fp32."""
    lora_bias: Literal["none", "all"] = param("none")
    """Whether biases are trained."""
    lora_fused: bool = param(False)
    """Gives the parts of one of megatron-core's layers (query, key and value of `linear_qkv`) one A together, as
    Megatron-SWIFT and Megatron-Bridge's `LoRA` do; False gives each an A of its own, as PEFT does."""
    use_rslora: bool = param(False)
    """Divides by the square root of the rank instead of the rank."""
    init_lora_weights: Literal["kaiming", "gaussian"] = param("kaiming")
    """What a new adapter's A begins with: uniform numbers within 1 / sqrt(inputs), or normal ones with standard
    deviation 1 / rank. B begins with zeros, so that a new adapter changes nothing."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def trains_part(self) -> bool:
        """Whether something of the model is frozen, as everything is beside adapters."""
        frozen = self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio
        trained = self.trainable_parameters or self.trainable_parameters_regex
        return self.tuner_type == "lora" or bool(frozen or trained)
