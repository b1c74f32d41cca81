"""The attention window of a new model, as `window_size` and `window_attn_skip_freq` declare it."""

from __future__ import annotations

import re

from megabatch.config.model import Model


def earlier_tokens(window_size: str) -> int | None:
    """Tokens before its own that a query sees; None where the text is not `left,0`."""
    found = re.fullmatch(r"(\d+),\s*0", window_size)
    return int(found[1]) if found else None


def declared_window(model: Model, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """`ModelShape.sliding_window`, which includes the query's own token, and `window_layers`."""
    earlier = None if model.window_size is None else earlier_tokens(model.window_size)
    if earlier is None:
        return None, ()
    skip = model.window_attn_skip_freq
    if skip is None:
        return earlier + 1, ()
    if isinstance(skip, int):
        windowed = tuple(layer % skip != 0 for layer in range(1, num_layers + 1))
    else:
        windowed = tuple(map(bool, skip))
    if not any(windowed):
        return None, ()
    return earlier + 1, () if all(windowed) else windowed
