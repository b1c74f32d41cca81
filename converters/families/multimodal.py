"""Vision-language models: converts the language part and carries everything else of the folder along unchanged.

megatron-core's tensors have the names of a pure language model.
"""

from __future__ import annotations

from dataclasses import replace

from megabatch.converters.families.config_json import Config, architecture
from megabatch.converters.families.decoder import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    OUTPUT,
    not_made,
    renamed,
    transposed_experts,
)
from megabatch.converters.families.gemma3 import GEMMA3_TEXT
from megabatch.converters.families.llama import LLAMA
from megabatch.converters.families.mistral import MISTRAL
from megabatch.converters.families.qwen2 import QWEN2
from megabatch.converters.families.qwen3 import QWEN3
from megabatch.converters.families.qwen3_moe import QWEN3_MOE
from megabatch.converters.family import Family
from megabatch.plan.shape import ModelShape


def _with_vision(
    text: Family,
    *,
    name: str,
    architectures: tuple[str, ...],
    model: str,
    head: str,
    carried: str,
    defaults: Config | None = None,
) -> Family:
    """A family that wraps another family's table.

    Args:
        model, head: what its folders have in place of the text model's `model.` and `lm_head.`.
        carried: regular expression for the tensors of its other parts.
        defaults: what transformers takes for keys that `text_config` leaves out; published ones leave out many.
    """

    def theirs(name: str) -> str:
        if name.startswith("model."):
            return model + name.removeprefix("model.")
        return head + name.removeprefix("lm_head.") if name.startswith("lm_head.") else name

    def shape(config: Config) -> ModelShape:
        own = text.shape(_text(config, text, defaults or {}))
        name_of_class = architecture(config, default=architectures[0])
        return replace(own, model_type=name, architecture=name_of_class, hf_config=dict(config))

    return Family(
        name=name,
        architectures=architectures,
        rows=tuple(renamed(row, ours=str, theirs=theirs) for row in text.rows),
        shape=shape,
        hf_config=not_made,
        tied={theirs(name): theirs(of) for name, of in text.tied.items()},
        carried=carried,
    )


def _text(config: Config, text: Family, defaults: Config) -> Config:
    """The language model's config.json; older folders have its keys beside `vision_config`.

    Whether embeddings are tied, the outer config.json decides where it says so. Quantisation stands there only.
    """
    nested = config.get("text_config")
    inner = {**defaults, **nested} if nested else dict(config)
    inner["architectures"] = [text.architectures[0]]
    for outer in ("tie_word_embeddings", "quantization_config"):
        if config.get(outer) is not None:
            inner[outer] = config[outer]
    return inner


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
}  # fmt: skip

_TOWER = r"(vision_tower|multi_modal_projector)\..+"

MULTIMODAL = (
    _with_vision(
        GEMMA3_TEXT, name="gemma3", architectures=("Gemma3ForConditionalGeneration",),
        model="language_model.model.", head="language_model.lm_head.", carried=_TOWER,
        defaults=_GEMMA3,
    ),
    _with_vision(
        LLAMA, name="llava", architectures=("LlavaForConditionalGeneration",),
        model="language_model.model.", head="language_model.lm_head.", carried=_TOWER,
        defaults=_LLAMA,
    ),
    _with_vision(
        MISTRAL, name="mistral3", architectures=("Mistral3ForConditionalGeneration",),
        model="language_model.model.", head="language_model.lm_head.", carried=_TOWER,
        defaults=_MISTRAL,
    ),
    _with_vision(
        QWEN2, name="qwen2_vl", architectures=("Qwen2VLForConditionalGeneration",),
        model="model.", head="lm_head.", carried=r"visual\..+",
    ),
    _with_vision(
        QWEN2, name="qwen2_5_vl", architectures=("Qwen2_5_VLForConditionalGeneration",),
        model="model.", head="lm_head.", carried=r"visual\..+",
    ),
    _with_vision(
        QWEN3, name="qwen3_vl", architectures=("Qwen3VLForConditionalGeneration",),
        model="model.language_model.", head="lm_head.", carried=r"model\.visual\..+",
    ),
    _with_vision(
        replace(QWEN3_MOE, rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *transposed_experts(), *OUTPUT)),
        name="qwen3_vl_moe", architectures=("Qwen3VLMoeForConditionalGeneration",),
        model="model.language_model.", head="lm_head.", carried=r"model\.visual\..+",
        defaults={"norm_topk_prob": True},
    ),
)  # fmt: skip
"""Published folders and those that transformers saves have the same names."""
