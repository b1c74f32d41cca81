"""Small models and adapters of them, made and saved by transformers and peft themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

IDS = torch.arange(1, 40)[None]
_BASE = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_MOE = {**_BASE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MIXTRAL = {**_BASE, "num_local_experts": 3, "num_experts_per_tok": 2}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LINEAR = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A base model and a LoraConfig."""

    model: str
    settings: dict[str, Any]
    lora: dict[str, Any]
    one_by_one: tuple[str, ...] = ()
    """Names of experts' layers that have an adapter each, as before transformers 5."""
    shared: bool = field(default=False)
    """Whether layers that megatron-core fuses have one A, as when they were trained there."""


CASES = {
    "llama": Case("Llama", _BASE, {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR}),
    "llama-biases": Case(
        "Llama",
        {**_BASE, "attention_bias": True, "mlp_bias": True},
        {"target_modules": _LINEAR, "bias": "lora_only", "use_rslora": True},
    ),
    "qwen3-patterns": Case(
        "Qwen3",
        {**_BASE, "head_dim": 8, "attention_bias": True},
        {
            "r": 3, "lora_alpha": 7, "target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.[qkvogud]\w*_proj",
            "rank_pattern": {"q_proj": 5, r"model\.layers\.1\.mlp\..*": 2},
            "alpha_pattern": {r"layers\.1\..*": 5, "up_proj": 11}, "use_rslora": True, "bias": "all",
        },
    ),
    "qwen3-one-layer": Case(
        "Qwen3",
        {**_BASE, "head_dim": 8},
        {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "llama-embeddings": Case(
        "Llama", _BASE, {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "lora_alpha": 5}
    ),
    "llama-tied-embedding": Case(
        "Llama", {**_BASE, "tie_word_embeddings": True}, {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}
    ),
    "llama-tied-head-saved": Case(
        "Llama", {**_BASE, "tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "llama-saved": Case(
        "Llama", _BASE, {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "moe-fused": Case(
        "Qwen3Moe", _MOE,
        {"r": 2, "target_modules": _ATTENTION, "target_parameters": [*_EXPERTS, "gate.weight"], "use_rslora": True,
         "rank_pattern": {r".*\.gate_up_proj": 3}},
    ),
    "moe-down-only": Case(
        "Qwen3Moe", _MOE, {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    ),
    "moe-one-by-one": Case(
        "Qwen3Moe", _MOE, {"r": 2, "lora_alpha": 3, "target_modules": _LINEAR},
        one_by_one=("gate_proj", "up_proj", "down_proj"),
    ),
    "moe-shared": Case(
        "Qwen3Moe", _MOE, {"r": 2, "target_modules": [*_LINEAR, "gate"]},
        one_by_one=("gate_proj", "up_proj", "down_proj"), shared=True,
    ),
    "mixtral-fused": Case(
        "Mixtral", _MIXTRAL, {"r": 2, "target_modules": ["k_proj"], "target_parameters": _EXPERTS}
    ),
    "llama-shared": Case(
        "Llama", _BASE, {"r": 4, "target_modules": [*_LINEAR, "embed_tokens", "lm_head"]}, shared=True
    ),
}  # fmt: skip

PARAMETERS = {
    "qwen3-router": Case(
        "Qwen3Moe", _MOE, {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
    ),
    "router-and-parameter": Case(
        "Qwen3Moe", _MOE, {"r": 2, "target_modules": [], "target_parameters": ["gate.weight", "q_proj.weight"]}
    ),
    "moe-dense-beside": Case(
        "Qwen3Moe",
        {**_MOE, "mlp_only_layers": [0]},
        {
            "r": 2,
            "target_modules": _ATTENTION,
            "target_parameters": [*_EXPERTS, *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))],
        },
    ),
}
"""With single parameters in place of modules."""

GPT_OSS = Case(
    "GptOss",
    {**_BASE, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
    {"r": 2, "target_modules": _ATTENTION, "target_parameters": _EXPERTS},
)
"""Whose experts' rows are in another order than megatron-core's."""


@dataclass(frozen=True)
class Made:
    """What is on disk, and what peft makes of it."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    """Of the model with its adapter."""
    base_logits: torch.Tensor
    merged: Tensors
    """peft's `merge_and_unload`, as transformers saves it."""


def make(case: Case, folder: Path) -> Made:
    """A random model and adapter in `folder`, and peft's results for them."""
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    model = getattr(transformers, f"{case.model}ForCausalLM")(
        getattr(transformers, f"{case.model}Config")(**case.settings)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(base)
    base_logits = logits(model)
    config = peft.LoraConfig(**case.lora, init_lora_weights=False, task_type="CAUSAL_LM")
    if case.one_by_one:
        _one_by_one(case, config, model, adapter)
    else:
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 0.2)
        adapted.save_pretrained(adapter)
    if case.shared:
        _share(adapter)
    return _results(base, adapter, folder, base_logits)


def _results(base: Path, adapter: Path, folder: Path, base_logits: torch.Tensor) -> Made:
    loaded = load(base, adapter)
    got = logits(loaded)
    loaded.merge_and_unload().save_pretrained(folder / "merged")
    merged = load_file(folder / "merged" / "model.safetensors")
    assert (got - base_logits).abs().max() > 0.02  # the adapter matters
    return Made(base, adapter, got, base_logits, merged)


def load(base: Path, adapter: Path) -> Any:
    """The model with its adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def logits_of(folder: Path) -> torch.Tensor:
    """Of a Hugging Face folder."""
    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _one_by_one(case: Case, config: peft.LoraConfig, model: Any, folder: Path) -> None:
    """An adapter as it was saved when each expert had layers of its own: names and shapes written out by hand."""
    hidden, width, rank = model.config.hidden_size, model.config.moe_intermediate_size, config.r
    heads, groups = 4 * model.config.head_dim, 2 * model.config.head_dim
    shapes = {
        "q_proj": (heads, hidden), "k_proj": (groups, hidden), "v_proj": (groups, hidden), "o_proj": (hidden, heads),
        "gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width),
        "gate": (model.config.num_experts, hidden),
    }  # fmt: skip
    tensors: Tensors = {}
    for layer in range(model.config.num_hidden_layers):
        places = {name: [f"self_attn.{name}"] for name in _ATTENTION} | {"gate": ["mlp.gate"]}
        for name in case.one_by_one:
            places[name] = [f"mlp.experts.{expert}.{name}" for expert in range(model.config.num_experts)]
        for name in case.lora["target_modules"]:
            rows, columns = shapes[name]
            for place in places[name]:
                key = f"base_model.model.model.layers.{layer}.{place}.lora_"
                tensors[f"{key}A.weight"] = torch.randn(rank, columns) * 0.3
                tensors[f"{key}B.weight"] = torch.randn(rows, rank) * 0.3
    folder.mkdir()
    save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _share(folder: Path) -> None:
    """Gives q, k and v of a layer the same A, and gate and up."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            for other in others:
                if f"{first}.lora_A" in name:
                    tensors[name.replace(first, other)] = tensors[name].clone()
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})


def changed(adapter: Path, folder: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """A copy of an adapter with other tensors or another config."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
