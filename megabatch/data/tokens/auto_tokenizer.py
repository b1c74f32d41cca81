"""transformers' AutoTokenizer without the code that generates text, or all of torch, which its module imports for
models alone."""

from __future__ import annotations

import importlib
import sys
from typing import Any

_FACTORY = "transformers.models.auto.auto_factory"
_MIXIN = "GenerationMixin"
_GIVES_IT = "add_generation_mixin_to_remote_model"


def auto_tokenizer() -> Any:
    """The class `transformers.AutoTokenizer`.

    Its module shares one with the models' Auto classes, and that one imports `GenerationMixin`, and with it torch's
    compiler, and scikit-learn where that is installed: a third of what a process imports to tokenise (5.19). The mixin
    is only needed for models whose code lies beside their weights, and is imported when one of those asks for it.
    """
    generation = importlib.import_module("transformers.generation")
    if _FACTORY not in sys.modules and _MIXIN not in vars(generation):
        setattr(generation, _MIXIN, object)
        try:
            factory: Any = importlib.import_module(_FACTORY)
        finally:
            delattr(generation, _MIXIN)
        _import_it_when_needed(factory, generation)
    return importlib.import_module("transformers").AutoTokenizer


def import_without_torch() -> None:
    """For a process that only tokenises: transformers imports torch if it is installed, which takes longer than all
    else here, and no tokenizer needs it. A user's own code may import torch afterwards."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    auto_tokenizer()
    if sys.modules["torch"] is None:
        del sys.modules["torch"]


def _import_it_when_needed(factory: Any, generation: Any) -> None:
    give = getattr(factory, _GIVES_IT, None)
    if give is None:  # another transformers: as it would have been
        setattr(factory, _MIXIN, getattr(generation, _MIXIN))
        return

    def with_mixin(model_class: Any) -> Any:
        setattr(factory, _MIXIN, getattr(generation, _MIXIN))
        return give(model_class)

    setattr(factory, _GIVES_IT, with_mixin)
