"""The registry of model families. A new one is a module here with a `Family`, named in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from megabatch.converters.families.config_json import architecture
from megabatch.converters.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megabatch.converters.families.gemma3 import GEMMA3_TEXT
from megabatch.converters.families.glm4_moe import GLM4_MOE
from megabatch.converters.families.gpt_oss import GPT_OSS
from megabatch.converters.families.llama import LLAMA
from megabatch.converters.families.mistral import MISTRAL
from megabatch.converters.families.mixtral import MIXTRAL
from megabatch.converters.families.multimodal import MULTIMODAL
from megabatch.converters.families.qwen2 import QWEN2
from megabatch.converters.families.qwen3 import QWEN3
from megabatch.converters.families.qwen3_moe import QWEN3_MOE
from megabatch.converters.families.qwen3_next import QWEN3_NEXT
from megabatch.converters.family import Family
from megabatch.errors import ConversionError

_ALL = (
    *(DEEPSEEK_V2, DEEPSEEK_V3, GEMMA3_TEXT, GLM4_MOE, GPT_OSS, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE),
    *(QWEN3_NEXT, *MULTIMODAL),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""Families by Hugging Face's model type."""

_BY_ARCHITECTURE = {name: family for family in FAMILIES.values() for name in family.architectures}
# the same models without an output layer, which embed texts
_BY_ARCHITECTURE |= {
    f"{name.removesuffix('ForCausalLM')}Model": family
    for name, family in _BY_ARCHITECTURE.items()
    if name.endswith("ForCausalLM")
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is not set.

    Raises: ConversionError naming the nearest known architecture and how to add one, and where the two contradict each
    other: transformers goes by `model_type`.
    """
    name = architecture(hf_config, default="")
    if not name:
        return family_named(str(hf_config.get("model_type")))
    family = _BY_ARCHITECTURE.get(name)
    if family is None:
        raise _unknown("config.json: architectures", name, list(_BY_ARCHITECTURE), hf_config)
    stated = hf_config.get("model_type")
    if isinstance(stated, str) and stated in FAMILIES and stated != family.name:
        raise ConversionError(
            f"config.json: model_type={stated} is not that of architectures={name}, which is {family.name}: programs "
            "that go by the one or the other would compute different models; correct it"
        )
    return family


def family_named(model_type: str) -> Family:
    """The family with this Hugging Face model type. Raises: ConversionError naming the nearest."""
    if model_type not in FAMILIES:
        raise _unknown("model_type", model_type, list(FAMILIES), {})
    return FAMILIES[model_type]


def _unknown(field: str, value: str, known: list[str], hf_config: Mapping[str, Any]) -> ConversionError:
    """Names the family with the most similar model, or, if config.json does not tell, the nearest name."""
    alike = _built_alike(hf_config)
    near = get_close_matches(
        value, [name for family in alike for name in family.architectures] or known, n=1, cutoff=0
    )
    if alike:
        what = f"; by what config.json says of it, it is built most like {near[0]}"
    else:
        what = f"; the nearest is {near[0]}" if get_close_matches(value, near, cutoff=0.92) else ""
    return ConversionError(
        f"{field}={value} is not supported{what}. docs/families.md lists what is; to add it, write its table as a "
        "module in converters/families and name it in FAMILIES"
    )


class _Heard(dict[str, Any]):
    """A config.json that records which of its keys were read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.heard: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.heard.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.heard.add(key)
        return super().__getitem__(key)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _built_alike(hf_config: Mapping[str, Any]) -> list[Family]:
    """The families that can read another family's config.json, and use most of its keys."""
    experts = any(hf_config.get(name) for name in _EXPERTS)
    found: dict[int, list[Family]] = {}
    for family in FAMILIES.values():
        config = _Heard(hf_config)
        try:
            shape = family.shape(config)
        except ConversionError:
            continue
        if bool(shape.num_experts) == experts:
            found.setdefault(len(config.heard), []).append(family)
    return found[max(found)] if found else []
