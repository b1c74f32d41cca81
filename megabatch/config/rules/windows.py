"""Attention windows: of a form that the family has, or those that the model came with."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.config.windows import declared_window, earlier_tokens
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_SIZE, _SKIP = "model.window_size", "model.window_attn_skip_freq"
FAMILIES = {"mistral": False, "mixtral": False, "qwen3_moe": False, "qwen2": True, "qwen3": True}
"""Families whose attention may have windows, and whether single layers may be without."""


def window_has_a_length(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    window, skip = recipe.model.window_size, recipe.model.window_attn_skip_freq
    if window is not None and earlier_tokens(window) is None:
        rule = "must be the earlier tokens that a token sees, and 0 for the later ones, which it never sees"
        yield Fault(_SIZE, window, rule, try_=("127,0",))
    if skip is None:
        return
    if window is None:
        yield Fault(_SKIP, skip, "needs window_size, which is None")
    if isinstance(skip, int) and skip < 2:
        yield Fault(_SKIP, skip, "must be at least 2, or no layer has the window", try_=(2,))
    layers = shape.num_layers if shape is not None else recipe.model.num_layers
    if isinstance(skip, tuple) and layers is not None and (len(skip) != layers or set(skip) - {0, 1}):
        yield Fault(_SKIP, skip, f"must have a 0 or 1 for each of the model's {layers} layers")


def window_is_the_familys(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """What config.json cannot say of a family would be lost with the first export."""
    model = recipe.model
    if model.window_size is None or shape is None:
        return
    if model.model is not None:
        if declared_window(model, shape.num_layers) != (shape.sliding_window, shape.window_layers):
            own = "none" if shape.sliding_window is None else f"{shape.sliding_window - 1},0"
            yield Fault(_SIZE, model.window_size, f"must be unset or the model's own, {own} (from its config.json)")
    elif shape.model_type not in FAMILIES:
        rule = f"is not for {shape.model_type}, whose attention has no windows; {', '.join(FAMILIES)} have"
        yield Fault(_SIZE, model.window_size, rule, try_=(None,))
    elif model.window_attn_skip_freq is not None and not FAMILIES[shape.model_type]:
        rule = f"is not for {shape.model_type}, of which every layer has the window"
        yield Fault(_SKIP, model.window_attn_skip_freq, rule, try_=(None,))


RULES = (window_has_a_length, window_is_the_familys)
