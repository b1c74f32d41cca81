"""megatron-core's layers with adapters below them, by name, of which one is used or none.

The adapters are a child module `lora` of the layer, so the model's own parameters keep their names. The layer's class
becomes a subclass that calls the adapter in use. Layers are megatron-core's own or Transformer Engine's, which differ
in two ways: a norm may be a part of a linear layer, and one layer may be all of a rank's experts.
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
from megabatch.trainer.model.lora.grouped import Grouped
from megabatch.trainer.model.naming import weight_names

TRAINED = "default"
"""Name of the trained adapter, which is in use; any others are frozen."""


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    used: str | None = TRAINED

    @property
    def current(self) -> Adapter | Grouped | None:
        """The adapter in use; None if none is, or this layer has none of that name."""
        found = self[self.used] if self.used is not None and self.used in self else None
        assert found is None or isinstance(found, Adapter | Grouped)
        return found

    def added(self, x: Tensor, output: Any, *splits: Any) -> Any:
        """A layer's output, which is (output, bias) for linear layers, plus the term of the adapter in use.

        Args: splits: of grouped experts, how many rows of `x` each has.
        """
        adapter = self.current
        if adapter is None:
            return output
        if isinstance(output, tuple):
            return adapter(x, output[0], *splits), output[1]
        return adapter(x, output)


class _Kind(NamedTuple):
    adapter: type[Adapter]
    method: str = "forward"
    """The layer's method whose output the adapter adds to."""
    is_normed: bool = False
    """Whether the layer begins with a norm, whose output the adapter reads."""
    is_grouped: bool = False
    """Whether the layer is all of a rank's experts."""


_KINDS = {
    ColumnParallelLinear.__name__: _Kind(Column),
    RowParallelLinear.__name__: _Kind(Row),
    MegatronRouter.__name__: _Kind(Router, "gating"),
    VocabParallelEmbedding.__name__: _Kind(Embedding),
    "TEColumnParallelLinear": _Kind(Column),
    "TELayerNormColumnParallelLinear": _Kind(Column, is_normed=True),
    "TERowParallelLinear": _Kind(Row),
    "TEColumnParallelGroupedLinear": _Kind(Column, is_grouped=True),
    "TERowParallelGroupedLinear": _Kind(Row, is_grouped=True),
}
"""By the name of a layer's class or one that it derives from; Transformer Engine's are only there where it is."""


@functools.cache
def _adapted(layer: Any, kind: _Kind) -> type:
    """A subclass of a layer's class that adds its adapter."""

    def called(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = getattr(super(made, self), kind.method)(x, *args, **kwargs)
        if kind.is_normed:
            x, output = _normed(output)
        return self.lora.added(x, output, *(args if kind.is_grouped else ()))

    made = type(f"Adapted{layer.__name__}", (layer,), {kind.method: called})
    return made


def _normed(output: Any) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """(norm's output, (output, bias)) of a layer with `return_layernorm_output`, which orders them in two ways."""
    if len(output) == 3:
        out, bias, normed = output
    else:
        (out, normed), bias = output
    return normed, (out, bias)


def adapter_type(layer: nn.Module) -> type[Adapter]:
    """The kind of adapter that fits a layer. Raises: ConfigError for a layer of another kind."""
    return _kind(layer).adapter


def add_adapter(layer: Any, name: str, adapter: Adapter) -> None:
    """Attaches an adapter to a layer; of a layer that is several experts, the next one's."""
    kind = _kind(layer)
    if not isinstance(getattr(layer, "lora", None), Adapters):
        plain: Any = type(layer)
        layer.__class__ = _adapted(plain, kind)
        layer.lora = Adapters()
        if kind.is_normed:
            layer.return_layernorm_output = True
    if not kind.is_grouped:
        layer.lora[name] = adapter
        return
    if name not in layer.lora:
        layer.lora[name] = Grouped()
    layer.lora[name].append(adapter)


def _kind(layer: nn.Module) -> _Kind:
    for one in type(layer).__mro__:
        if one.__name__ in _KINDS:
            return _KINDS[one.__name__]
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
    found: dict[nn.Parameter, Adapter] = {}
    for layer in adapted_layers(chunks):
        current = layer.lora.current
        if current is not None:
            adapters = current if isinstance(current, Grouped) else (current,)
            found |= zip((getattr(layer, name) for name in weight_names(layer)), adapters, strict=True)
    return found
