"""Which models the trainer builds, and why not the others: the launcher asks before the queue, the trainer again."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.plan.shape import ModelShape

BUILT = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Model types (`ModelShape.model_type`) that the trainer builds; `docs/families.md` lists them."""

VOCABULARY_ROUNDED = 1024
"""Models of one family round the same vocabulary up to different sizes; tokenizers of others differ by more."""

_VISION = "vision-language models"
UNBUILT = {
    "deepseek_v2": "multi-latent attention",
    "deepseek_v3": "multi-latent attention",
    "gemma3": _VISION,
    "gemma3_text": "attention in windows and norms after attention and MLP",
    "glm4_moe": "partial rotary embeddings and sigmoid routing",
    "gpt_oss": "attention sinks and clamped activations",
    "llava": _VISION,
    "mistral3": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_vl": _VISION,
    "qwen3_next": "linear attention",
    "qwen3_vl": _VISION,
    "qwen3_vl_moe": _VISION,
}
"""What the trainer lacks for the other families that the converters support."""
_ROPES = ("default", "linear", "llama3")


def untrainable(shape: ModelShape) -> str | None:
    """Why the trainer cannot train a model of this shape; None when it can."""
    if shape.model_type not in BUILT:
        lacks = UNBUILT.get(shape.model_type, f"model_type={shape.model_type}")
        return f"the trainer does not support {lacks} yet; megabatch converts this family but cannot train it"
    return "; ".join(reason for rule in _RULES if (reason := rule(shape))) or None


def _rotary_embedding(shape: ModelShape) -> str | None:
    kind = (shape.rope_scaling or {}).get("rope_type", "default")
    return None if kind in _ROPES else f"rope_type={kind!r} is not built; {', '.join(_ROPES)} are"


_RULES: tuple[Callable[[ModelShape], str | None], ...] = (_rotary_embedding,)
