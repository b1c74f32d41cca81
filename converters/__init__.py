"""Checkpoints between Hugging Face's format and megatron-core's: `convert`, and the tables that the trainer reads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.converters.conversion import convert
    from megabatch.converters.request import ConversionRequest

__all__ = ["ConversionRequest", "convert"]
_MODULE_OF = {"ConversionRequest": "request", "convert": "conversion"}

if __name__ != "megabatch.converters":
    raise ImportError(
        f"import megabatch.{__name__}…: as {__name__}… it would be a second copy of every class", name=__name__
    )


def __getattr__(name: str) -> Any:
    """Imports the engine lazily: the trainer needs only the tables."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
