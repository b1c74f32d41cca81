"""megatron-core's layers with adapters below them, by name, of which one is used or none.

The adapters are a child module `lora` of the layer, so the model's own parameters keep their names. The layer's class
becomes a subclass that calls the adapter in use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.router import Router as MegatronRouter
from torch import Tensor, nn

from megabatch.errors import ConfigError
from megabatch.trainer.model.lora.adapter import Adapter, Column, Embedding, Router, Row

TRAINED = "default"
"""Name of the trained adapter, which is in use; any others are frozen."""


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    used: str | None = TRAINED

    @property
    def current(self) -> Adapter | None:
        """The adapter in use; None if none is, or this layer has none of that name."""
        found = self[self.used] if self.used is not None and self.used in self else None
        assert found is None or isinstance(found, Adapter)
        return found

    def added(self, x: Tensor, output: Any) -> Any:
        """A layer's output, which is (output, bias) for linear layers, plus the term of the adapter in use."""
        adapter = self.current
        if adapter is None:
            return output
        return (adapter(x, output[0]), output[1]) if isinstance(output, tuple) else adapter(x, output)


class _Kind(NamedTuple):
    layer: type
    method: str
    """The layer's method whose output the adapter adds to."""
    adapter: type[Adapter]


_KINDS = (
    _Kind(ColumnParallelLinear, "forward", Column),
    _Kind(RowParallelLinear, "forward", Row),
    _Kind(MegatronRouter, "gating", Router),
    _Kind(VocabParallelEmbedding, "forward", Embedding),
)


@functools.cache
def _adapted(layer: Any, method: str) -> type:
    """A subclass of a layer's class that adds its adapter."""

    def called(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.lora.added(x, getattr(super(made, self), method)(x, *args, **kwargs))

    made = type(f"Adapted{layer.__name__}", (layer,), {method: called})
    return made


def adapter_type(layer: nn.Module) -> type[Adapter]:
    """The kind of adapter that fits a layer. Raises: ConfigError for a layer of another kind."""
    return _kind(layer).adapter


def add_adapter(layer: Any, name: str, adapter: Adapter) -> None:
    """Attaches an adapter to a layer."""
    if not isinstance(getattr(layer, "lora", None), Adapters):
        plain: Any = type(layer)
        layer.__class__ = _adapted(plain, _kind(layer).method)
        layer.lora = Adapters()
    layer.lora[name] = adapter


def _kind(layer: nn.Module) -> _Kind:
    for kind in _KINDS:
        if isinstance(layer, kind.layer):
            return kind
    raise ConfigError(
        f"{type(layer).__name__} cannot have a LoRA adapter; leave it out of tuner.target_modules or report the model"
    )


def adapted_layers(chunks: Sequence[nn.Module]) -> Iterator[Any]:
    """Every layer with adapters."""
    return (m for chunk in chunks for m in chunk.modules() if isinstance(getattr(m, "lora", None), Adapters))


@contextmanager
def using(chunks: Sequence[nn.Module], name: str | None) -> Iterator[None]:
    """Inside this context the model uses this adapter; None means no adapter."""
    layers = list(adapted_layers(chunks))
    before = [layer.lora.used for layer in layers]
    for layer in layers:
        layer.lora.used = name
    try:
        yield
    finally:
        for layer, used in zip(layers, before, strict=True):
            layer.lora.used = used


def merged_weights(chunks: Sequence[nn.Module]) -> Mapping[nn.Parameter, Adapter]:
    """The weights that the adapters in use change, each with its adapter."""
    layers = (layer for layer in adapted_layers(chunks) if layer.lora.current is not None)
    return {layer.weight: layer.lora.current for layer in layers}
