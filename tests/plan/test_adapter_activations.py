"""What LoRA changes of a layer's activations, against what autograd saves in a layer of plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch.converters.families import family_of
from megabatch.plan.activations import layer_activations
from megabatch.plan.adapters import matrices
from megabatch.plan.layout import layout
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.settings import Lora, Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import chunks_of_counts

torch = pytest.importorskip("torch")

TOKENS, RANK = 64, 4


def _shape() -> ModelShape:
    config = KNOWN_MODELS["Qwen/Qwen2.5-14B"]
    sizes = {"hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
    return replace(family_of(config).shape(config), num_layers=1, kv_channels=8, vocab_size=64, **sizes)


def _counted(lora: Lora | None) -> float:
    found = layout(world_size=1, global_batch_size=1)
    assert found is not None
    settings = Settings(
        layout=found,
        chunks=chunks_of_counts([1], pp=1),
        row_tokens=TOKENS,
        mean_length=TOKENS,
        vocab_size=64,
        weight_bytes=4,
        recompute_granularity="none",
        lora=lora,
    )
    return layer_activations(_shape(), settings, (False, False)).whole


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """Keeps its input alone, as fused norms do."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient


class _GatedLinearUnit(torch.autograd.Function):  # type: ignore[misc]
    """Keeps its input alone, as the fused one does."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return torch.cat([gradient, gradient], -1)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """Keeps what it is given and what it gives, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, qkv: Any) -> Any:
        out = qkv.chunk(3, -1)[2].clone()
        ctx.save_for_backward(qkv, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return torch.cat([gradient] * 3, -1)


class _Linear(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, rows: int, cols: int, lora: Lora | None, name: str) -> None:
        super().__init__()
        self.base = torch.nn.Linear(cols, rows, bias=False).requires_grad_(lora is None)
        self.down = self.up = None
        if lora is not None and ("all-linear" in lora.targets or name in lora.targets):
            rank = RANK * matrices(name, lora)
            self.down, self.up = torch.nn.Linear(cols, rank, bias=False), torch.nn.Linear(rank, rows, bias=False)
            self.dropout, self.is_fused = lora.dropout, matrices(name, lora) > 1

    def forward(self, x: Any) -> Any:
        out = self.base(x)
        if self.down is None:
            return out
        # CUDA's kernel, which keeps a mask of bytes where the CPU's usual one keeps numbers
        narrow = self.down(torch.native_dropout(x, self.dropout, True)[0] if self.dropout else x)
        # several layers in one have a B of which each row counts one layer's columns, made for every pass
        return out + torch.nn.functional.linear(narrow, self.up.weight * 1.0 if self.is_fused else self.up.weight)


def _saved(lora: Lora | None) -> int:
    """Bytes that one layer keeps for its backward pass; weights are not counted."""
    qkv, proj = _Linear(96, 32, lora, "linear_qkv"), _Linear(32, 32, lora, "linear_proj")
    fc1, fc2 = _Linear(192, 32, lora, "linear_fc1"), _Linear(32, 96, lora, "linear_fc2")
    layers = torch.nn.ModuleList([qkv, proj, fc1, fc2])
    weights = {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}
    kept: list[Any] = []
    x = torch.randn(TOKENS, 32, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = x + proj(_Attention.apply(qkv(_Norm.apply(x))))
        fc2(_GatedLinearUnit.apply(fc1(_Norm.apply(x))))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", [("all-linear",), ("linear_qkv", "linear_proj"), ("linear_fc2",)])
def test_adapters_keep_what_autograd_keeps(targets: tuple[str, ...], dropout: float) -> None:
    lora = Lora(rank=RANK, targets=targets, dropout=dropout)
    assert _counted(lora) - _counted(None) == _saved(lora) - _saved(None)
    lora = replace(lora, fused=True)
    assert _counted(lora) - _counted(None) == _saved(lora) - _saved(None)


def test_frozen_matrices_keep_no_inputs() -> None:
    """Both norms' outputs and the product of the gated unit, by hand."""
    lora = Lora(rank=RANK, targets=("nothing",))
    assert _counted(None) - _counted(lora) == 4 * TOKENS * (32 + 32 + 96)
